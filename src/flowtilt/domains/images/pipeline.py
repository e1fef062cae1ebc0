"""Folders of diffusers' StableDiffusionPipeline as flows: prompts in, latents along the way, images out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from flowtilt.checkpoints import CheckpointError, check_loaded
from flowtilt.domains.images.alignment import warn_of_long
from flowtilt.domains.images.model import LatentFlow, Target
from flowtilt.domains.images.rewards import Decode
from flowtilt.domains.images.schedule import DiscreteSchedule, end_level
from flowtilt.domains.images.sections import AdapterConfig, ComputeConfig, GuidanceConfig, ScheduleConfig
from flowtilt.files import read_json
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.seeding import seed_of

log = logging.getLogger(__name__)

DISCRETE = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler")
"""Schedulers whose noise levels are those of DDIM, whose eta = 1 is memoryless."""

TEXTS = 1000
"""Prompts that go through the text encoder together: of a training list there may be ten thousand."""

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

_GUIDANCE, _SCHEDULE, _COMPUTE = GuidanceConfig(), ScheduleConfig(), ComputeConfig()


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image model as a flow and what is around it.

    Attributes:
        flow: on latents, with the prompts that contexts are drawn from.
        prompts: in the order of the contexts' positions.
    """

    flow: LatentFlow
    decode: Decode
    prompts: tuple[str, ...]


def load_text_to_image(
    folder: Path,
    prompts: Sequence[str],
    guidance: GuidanceConfig = _GUIDANCE,
    schedule: ScheduleConfig = _SCHEDULE,
    compute: ComputeConfig = _COMPUTE,
    adapter: AdapterConfig | None = None,
) -> TextToImage:
    """A folder of diffusers' StableDiffusionPipeline, with weights as safetensors, as a flow.

    Args:
        guidance: scales by use.
        adapter: adapters that are fine-tuned instead of the denoiser's weights.

    Raises:
        CheckpointError: if a part of the folder is missing, cannot be read, or does not fit the others.
        ConfigError: if the scheduler has no memoryless form, the schedule does not fit the model, or the
            denoiser has no layers for the adapter.
    """
    check_parts(folder)
    path = build_schedule(folder, schedule)
    # Up to 15 % faster on a CPU than torch's default, mostly in backward passes (benchmarks/images.py).
    denoiser = _loaded(UNet2DConditionModel, folder, "unet").to(memory_format=torch.channels_last)
    autoencoder = _loaded(AutoencoderKL, folder, "vae")
    table, empty = embeddings(folder, prompts)
    _check_fit(folder, denoiser.config, autoencoder.config, empty.shape[-1])
    added = None if adapter is None else _add_adapter(denoiser, adapter)
    if compute.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        autoencoder.enable_gradient_checkpointing()
    size = denoiser.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    settings = _scheduler_settings(folder)
    try:
        flow = LatentFlow(
            denoiser,
            path,
            (denoiser.config.in_channels, height, width),
            settings["prediction_type"],
            schedule.spacing,
            settings["steps_offset"],
            guidance,
            compute.precision,
            compute.chunk,
            added,
        )
    except ValueError as error:
        raise ConfigError(f"{folder}: {error} (key schedule.zero_terminal_snr)") from None
    flow.use_prompts(table, empty)
    return TextToImage(
        flow.requires_grad_(False), partial(_decoded, autoencoder, compute.chunk), tuple(prompts)
    )


def _decoded(autoencoder: AutoencoderKL, chunk: int | None, latents: Tensor) -> Tensor:
    """Images of latents; where no gradient is kept, a ``chunk`` at a time."""
    if chunk is not None and len(latents) > chunk and not torch.is_grad_enabled():
        return torch.cat([_decoded(autoencoder, None, part) for part in latents.split(chunk)])
    images: Tensor = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
    return images.clamp(-1, 1)


def check_parts(folder: Path) -> None:
    """Refuse a folder that lacks a part of a pipeline. Raises CheckpointError, naming the part."""
    whole = "a folder that diffusers' StableDiffusionPipeline.save_pretrained writes has it"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; key model.pipeline.path must name one of a StableDiffusionPipeline, "
            "and the rule fetch_checkpoint fetches what has a key hub"
        )
    for part in PARTS:
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        needed = "vocab.json" if part == "tokenizer" else file
        present = (folder / part / needed).is_file() or (
            part == "tokenizer" and (folder / part / "tokenizer.json").is_file()
        )
        if not present:
            raise CheckpointError(f"{folder / part / needed}: no such file; {whole}")


def _loaded(kind: Any, folder: Path, part: str) -> Any:
    """A part with its weights, frozen, in 32 bits."""
    try:
        found, report = kind.from_pretrained(
            folder / part,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise many kinds, safetensors one of its own
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / part}: cannot be read as a {kind.__name__} with weights as safetensors ({first}); "
            "restore the folder"
        ) from None
    if lacking := sorted(report["missing_keys"]):  # the libraries warn, and draw them at random
        raise CheckpointError(
            f"{folder / part}: its safetensors lack {len(lacking)} of the weights of a {kind.__name__}, the "
            f"first {lacking[0]}; restore the folder"
        )
    check_loaded(found, sorted((folder / part).glob("*.safetensors")), "restore the folder")
    return found.eval().requires_grad_(False).to(torch.get_default_device())


def _check_fit(folder: Path, denoiser: Any, autoencoder: Any, width: int) -> None:
    """Refuse parts that are not those of one StableDiffusionPipeline, as of inpainting or of a larger one."""
    channels = ("the latents' channels", autoencoder.latent_channels)
    expected = {
        "in_channels": channels,
        "out_channels": channels,
        "cross_attention_dim": ("the text encoder's features", width),
    }
    for key, (what, number) in expected.items():
        if denoiser[key] != number:
            raise CheckpointError(
                f"{folder / 'unet' / 'config.json'}: {key} is {denoiser[key]}, and {what} are {number}; give "
                "the folder of a plain StableDiffusionPipeline"
            )


def _scheduler_settings(folder: Path) -> dict[str, Any]:
    """All settings of a folder's scheduler, with its own kind's defaults for those that its file lacks.

    Raises:
        CheckpointError: if the file cannot be read.
        ConfigError: if the scheduler has no memoryless form, or the file has not its settings.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    try:
        settings = dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: not a scheduler's settings ({error}); restore the folder") from None
    kind = settings.get("_class_name")
    if kind not in DISCRETE:
        raise ConfigError(
            f"{file}: {kind} has no memoryless form that is known here, that of DDIM with eta = 1; known are "
            f"{', '.join(DISCRETE)}; correct the file, or give another pipeline"
        )
    try:
        with torch.device("cpu"):
            return dict(getattr(diffusers, kind).from_config(settings).config)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{file}: not settings of a {kind} ({error}); restore the folder") from None


def build_schedule(folder: Path, changes: ScheduleConfig = _SCHEDULE) -> DiscreteSchedule:
    """The path of a folder's scheduler, with changes.

    Raises:
        CheckpointError: if the scheduler's file cannot be read.
        ConfigError: if the scheduler has no memoryless form, or the changes make no schedule of it.
    """
    settings, file = _scheduler_settings(folder), folder / "scheduler" / "scheduler_config.json"
    for key in ("clip_sample", "thresholding"):
        if settings.get(key, False):
            raise ConfigError(f"{file}: {key} makes a step nonlinear in the prediction; set it to false")
    if settings["prediction_type"] not in get_args(Target):
        raise ConfigError(
            f"{file}: prediction_type {settings['prediction_type']!r} is not known here; known are "
            f"{', '.join(get_args(Target))}"
        )
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    # Where a scheduler has no such key, its last step leads to data without noise.
    known = {"set_alpha_to_one": True, "rescale_betas_zero_snr": False} | known | {"clip_sample": False}
    known["rescale_betas_zero_snr"] |= changes.zero_terminal_snr
    if changes.betas is not None:
        if known["beta_schedule"] not in ("linear", "scaled_linear"):
            raise ConfigError(
                f"key schedule.betas: {file} has the beta_schedule {known['beta_schedule']}, "
                "which has no first and last variance; remove the key"
            )
        known |= {"beta_start": changes.betas[0], "beta_end": changes.betas[1], "trained_betas": None}
    try:
        with torch.device("cpu"):
            path = schedule_of(DDIMScheduler.from_config(known))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{file}: no schedule follows from it and the key schedule.betas ({error})"
        ) from None
    return path if changes.end is None else replace(path, end=end_level(path.levels[0], changes.end))


def schedule_of(scheduler: DDIMScheduler) -> DiscreteSchedule:
    """The path of a DDIM scheduler."""
    levels = scheduler.alphas_cumprod.double()
    return DiscreteSchedule(tuple(levels.tolist()), float(scheduler.final_alpha_cumprod))


@torch.no_grad()
def embeddings(folder: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts, (prompts, tokens, width), and of the empty one, (tokens, width). A prompt that
    is longer than the text encoder takes is cut, and a warning says so."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'tokenizer'}: cannot be read ({' '.join(str(error).split())[:300]}); restore it"
        ) from None
    encoder = _loaded(CLIPTextModel, folder, "text_encoder")
    limit = encoder.config.max_position_embeddings
    warn_of_long(
        prompts, lambda prompt: len(tokenizer(prompt, verbose=False).input_ids), limit, "text encoder"
    )
    tokens = tokenizer(
        [*prompts, ""], padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    ).input_ids
    device = torch.get_default_device()
    found = torch.cat([encoder(some.to(device)).last_hidden_state for some in tokens.split(TEXTS)])
    return found[:-1], found[-1]


def _add_adapter(denoiser: UNet2DConditionModel, config: AdapterConfig) -> dict[str, Any]:
    """Low-rank adapters (Hu et al. 2022), which do nothing before they are trained; their settings."""
    from peft import LoraConfig

    settings = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": sorted(set(config.targets))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("adapter", config.rank))
        try:
            denoiser.add_adapter(LoraConfig(**settings, init_lora_weights="gaussian"))
        except ValueError as error:
            raise ConfigError(f"key adapter.targets: {error}") from None
    return settings
