"""Folders of diffusers' pipeline as flows, against diffusers itself."""

import json
import logging
import math
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowtilt.checkpoints import CheckpointError, load_weights, save_weights
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.control.base import Solution
from flowtilt.domains.images.build import build_autoencoder, build_pipeline, build_text_encoder
from flowtilt.domains.images.model import LatentFlow
from flowtilt.domains.images.pipeline import TextToImage, build_schedule, load_text_to_image
from flowtilt.domains.images.sections import (
    AdapterConfig,
    ComputeConfig,
    EmbeddedConfig,
    GuidanceConfig,
    ScheduleConfig,
)
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.model import Context
from flowtilt.pipeline.configuration import ConfigError, merge
from flowtilt.rewards import Reward
from flowtilt.sampling import memoryless_steps, sample_sde

FIT = {"updates": 1}
CONFIG = EmbeddedConfig.model_validate(
    {
        "bridges": {"count": 8, "size": 16},
        "autoencoder": {"channels": [16, 16], "kl_weight": 1e-4, "fit": FIT},
        "text": {"merges": 300, "length": 12, "width": 16, "layers": 1, "heads": 2},
        "denoiser": {"channels": [16, 16], "head_width": 8, "fit": FIT},
        "alignment": {"embedding": 8, "patch": 4, "width": 16, "layers": 1, "heads": 2, "fit": FIT},
    }
)
PROMPTS = ["a red bridge", "a stone arch over the sea"]
ADAPTER = AdapterConfig(rank=2, alpha=4.0)
STEPS = 5

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PUBLISHED = {  # the scheduler that Stable Diffusion 1.4 is published with
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    **BETAS,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DDIM = {"_class_name": "DDIMScheduler", **BETAS, "clip_sample": False, "steps_offset": 1}
OF_V = DDIM | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    yield
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of an untrained pipeline, with embeddings and predictions so large that the prompts matter."""
    found = tmp_path_factory.mktemp("pipelines") / "own"
    pipeline = build_pipeline(CONFIG)
    with torch.no_grad():
        pipeline.text_encoder.final_layer_norm.weight.mul_(3)
        pipeline.unet.conv_out.weight.mul_(3)
    pipeline.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def folders(folder) -> dict[str, Path]:
    """The same with other schedulers; that of PNDM in the layout of Stable Diffusion 1.4."""
    of_v, published = (Path(shutil.copytree(folder, folder.with_name(name))) for name in ("v", "published"))
    write_scheduler(of_v, OF_V)
    write_scheduler(published, PUBLISHED)
    index = json.loads((published / "model_index.json").read_text())
    for part in ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker"):
        del index[part]
    (published / "model_index.json").write_text(json.dumps(index))
    weights = published / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(CONFIG.text.length)[None]
    save_file(tensors, weights, {"format": "pt"})
    write_early_tokenizer(published / "tokenizer")
    return {"own": folder, "of v": of_v, "published": published}


def write_scheduler(folder: Path, settings: dict[str, object]) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))


def write_early_tokenizer(folder: Path) -> None:
    """Vocabulary and merges as files of their own, as transformers wrote them before tokenizer.json."""
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in whole["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """One's own copy of the folder, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


# Sampling, against diffusers.


@pytest.fixture(scope="module")
def pipeline(folder) -> StableDiffusionPipeline:
    found = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


def starts(generator: torch.Generator) -> Tensor:
    """The noise that sampling begins with."""
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=generator)


def by_diffusers(pipeline: StableDiffusionPipeline, folder: Path, guidance: float, **changes) -> Tensor:
    """Latents of the prompts by a folder's noise schedule in DDIM with eta = 1."""
    pipeline.scheduler = scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **changes)
    # Where no signal is left, DDIM takes the root of what rounding leaves of zero: 3e-4 in float32.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double().clamp(min=1e-14)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    generator = torch.Generator().manual_seed(5)
    return pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        eta=1.0,
        latents=starts(generator),
        generator=generator,
        output_type="latent",
    ).images


def sampled(loaded: TextToImage) -> Tensor:
    """Latents of the prompts, from the same noise."""
    context = loaded.flow.context_of(torch.arange(len(PROMPTS)))
    generator = torch.Generator().manual_seed(5)
    return sample_sde(loaded.flow, len(PROMPTS), STEPS, generator, context)[-1]


@pytest.mark.parametrize(
    ("name", "changes", "scheduler"),
    [
        ("own", {}, {}),
        ("own", {"spacing": "leading"}, {"timestep_spacing": "leading"}),
        ("own", {"betas": (1e-4, 0.02)}, {"beta_start": 1e-4, "beta_end": 0.02}),
        ("published", {}, {"timestep_spacing": "trailing"}),
        ("published", {"spacing": "leading"}, {}),
        ("of v", {}, {}),
        ("of v", {"zero_terminal_snr": True}, {"rescale_betas_zero_snr": True}),
    ],
)
@pytest.mark.slow_after(2)
def test_samples_are_those_of_diffusers(folders, pipeline, name, changes, scheduler):
    """To 1e-4 of the latents' size: rounding in float32 of all steps, with thrice that of a difference.

    Guidance that is 3 % stronger makes a difference of more than ten times that.
    """
    schedule = ScheduleConfig.model_validate(changes)
    loaded = load_text_to_image(folders[name], PROMPTS, schedule=schedule)
    for guidance in (1.0, 3.0):
        loaded.flow.guidance = GuidanceConfig(sampling=guidance)
        expected = by_diffusers(pipeline, folders[name], guidance, **scheduler)
        torch.testing.assert_close(sampled(loaded), expected, atol=1e-4 * float(expected.std()), rtol=0)
    loaded.flow.guidance = GuidanceConfig(sampling=3.1)
    assert (sampled(loaded) - expected).abs().max() > 1e-3 * expected.std()


def test_the_parts_of_a_loaded_folder(folders, pipeline):
    for name, target in (("own", "epsilon"), ("published", "epsilon"), ("of v", "v_prediction")):
        loaded = load_text_to_image(folders[name], PROMPTS)
        flow = loaded.flow
        assert loaded.prompts == tuple(PROMPTS)
        assert (flow.shape, flow.target, flow.spacing, flow.offset) == ((4, 8, 8), target, "trailing", 1)
        assert not any(p.requires_grad or p.dtype != torch.float32 for p in flow.parameters())
        of_prompts, of_nothing = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
        torch.testing.assert_close(flow.prompts.table, of_prompts)
        torch.testing.assert_close(flow.prompts.empty.expand(2, -1, -1), of_nothing)
        latents = starts(torch.Generator().manual_seed(0))
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(loaded.decode(latents), images.clamp(-1, 1))
        assert images.shape == (2, 3, 16, 16)
        assert images.abs().max() > 1  # or it would not matter that colours have an end


def test_half_precision_weights_are_computed_with_in_single(folder, copied):
    for file in copied.rglob("*.safetensors"):
        save_file({name: t.half() for name, t in load_file(file).items()}, file, {"format": "pt"})
    loaded = load_text_to_image(copied, PROMPTS)
    assert {p.dtype for p in loaded.flow.parameters()} == {torch.float32}
    whole = load_text_to_image(folder, PROMPTS)
    # Half precision rounds weights by 5e-4 of them.
    torch.testing.assert_close(
        sampled(loaded), sampled(whole), atol=0.02 * float(sampled(whole).std()), rtol=0
    )


# The noise schedule.


@pytest.mark.parametrize(
    ("settings", "changes", "known"),
    [
        (DDIM, {}, BETAS),
        (PUBLISHED, {}, BETAS | {"set_alpha_to_one": False}),
        # Keys that a file lacks have the values that its own kind of scheduler gives them.
        ({"_class_name": "PNDMScheduler", **BETAS}, {}, BETAS | {"set_alpha_to_one": False}),
        ({"_class_name": "DDPMScheduler", **BETAS, "clip_sample": False}, {}, BETAS),
        ({"_class_name": "LMSDiscreteScheduler"}, {}, {}),
        (DDIM | {"set_alpha_to_one": False}, {}, BETAS | {"set_alpha_to_one": False}),
        (DDIM, {"betas": (0.001, 0.03)}, BETAS | {"beta_start": 0.001, "beta_end": 0.03}),
        (DDIM | {"trained_betas": [0.1, 0.2]}, {}, {"trained_betas": [0.1, 0.2]}),
        (DDIM | {"trained_betas": [0.1, 0.2]}, {"betas": (0.00085, 0.012)}, BETAS),
        (DDIM, {"zero_terminal_snr": True}, BETAS | {"rescale_betas_zero_snr": True}),
        (DDIM | {"rescale_betas_zero_snr": True}, {}, BETAS | {"rescale_betas_zero_snr": True}),
        (
            DDIM,
            {"betas": (0.001, 0.03), "zero_terminal_snr": True},
            BETAS | {"beta_start": 0.001, "beta_end": 0.03, "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_signal_levels_are_those_of_ddim(tmp_path, settings, changes, known):
    (tmp_path / "scheduler").mkdir()
    write_scheduler(tmp_path, settings)
    path = build_schedule(tmp_path, ScheduleConfig.model_validate(changes))
    expected = DDIMScheduler(**known)
    assert list(path.levels) == expected.alphas_cumprod.tolist()
    assert path.end == expected.final_alpha_cumprod
    assert (path.levels[-1] == 0) == known.get("rescale_betas_zero_snr", False)


def test_a_denoiser_of_noise_needs_some_signal(folder):
    message = r"ratio of zero needs a denoiser that predicts .* \(key schedule.zero_terminal_snr\)$"
    with pytest.raises(ConfigError, match=message):
        load_text_to_image(folder, PROMPTS, schedule=ScheduleConfig(zero_terminal_snr=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler", **BETAS}, "EulerDiscreteScheduler has no memoryless form"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "FlowMatchEulerDiscreteScheduler has no memoryl",
        ),
        (BETAS, "None has no memoryless form"),
        (
            DDIM | {"clip_sample": True},
            "clip_sample makes a step nonlinear in the prediction; set it to false",
        ),
        ({"_class_name": "DDPMScheduler", **BETAS}, "clip_sample makes a step nonlinear"),
        (DDIM | {"thresholding": True}, "thresholding makes a step nonlinear"),
        (
            DDIM | {"prediction_type": "flow"},
            "prediction_type 'flow' is not known here; known are epsilon, v_",
        ),
        (DDIM | {"beta_schedule": "cubic"}, "not settings of a DDIMScheduler .cubic is not implemented"),
        (DDIM | {"beta_end": 1.5}, "no schedule follows from it"),
    ],
)
def test_schedulers_that_are_not_meant_are_refused(copied, settings, message):
    write_scheduler(copied, settings)
    with pytest.raises(ConfigError, match=rf"{copied}/scheduler/scheduler_config.json: {message}"):
        load_text_to_image(copied, PROMPTS)


def test_betas_that_change_nothing_are_refused(copied):
    write_scheduler(copied, DDIM | {"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(
        ConfigError, match=r"key schedule.betas: .* has the beta_schedule squaredcos_cap_v2, "
    ):
        build_schedule(copied, ScheduleConfig(betas=(0.001, 0.02)))


def test_betas_that_are_no_schedule_are_refused(folder):
    with pytest.raises(ConfigError, match=r"and the key schedule.betas \(.*must"):
        build_schedule(folder, ScheduleConfig(betas=(0.001, 1.5)))


# Adapters, weights, gradient checkpointing.


def velocities(flow: LatentFlow) -> Tensor:
    """At the prompts, with guidance."""
    context = flow.context_of(torch.arange(len(PROMPTS)))
    return flow.velocity(starts(torch.Generator().manual_seed(1)), torch.tensor(0.4), context)


def shaken(flow: LatentFlow) -> LatentFlow:
    """With other values of what is fine-tuned."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in flow.tunable():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flow


def test_an_adapter_does_nothing_before_it_is_trained(folder):
    state = torch.random.get_rng_state()
    plain = load_text_to_image(folder, PROMPTS, GuidanceConfig(sampling=2))
    with_adapter, again = (
        load_text_to_image(folder, PROMPTS, GuidanceConfig(sampling=2), adapter=ADAPTER) for _ in range(2)
    )
    assert torch.equal(velocities(with_adapter.flow), velocities(plain.flow))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in again.flow.weights().items():
        assert torch.equal(tensor, with_adapter.flow.weights()[name])


def test_what_is_tuned_is_the_adapters_alone(folder):
    flow = load_text_to_image(folder, PROMPTS, adapter=ADAPTER).flow
    attended = [
        n for n, _ in flow.denoiser.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert len(attended) == 32  # four attentions, each to itself and to the prompt, with four layers
    assert flow.weights().keys() == {f"unet.{n}.lora_{side}.weight" for n in attended for side in "AB"}
    tunable = {id(p) for p in flow.tunable()}
    expected = {f"{n}.lora_{side}.default.weight" for n in attended for side in "AB"}
    assert {n for n, p in flow.denoiser.named_parameters() if id(p) in tunable} == expected
    assert {min(p.shape) for p in flow.tunable()} == {2}
    whole = load_text_to_image(folder, PROMPTS).flow
    assert len(whole.tunable()) == len(list(whole.denoiser.parameters())) == len(whole.weights())


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["whole", "adapter"])
def test_what_was_tuned_is_saved_and_loaded(folder, tmp_path, adapter):
    flow = load_text_to_image(folder, PROMPTS, adapter=adapter).flow
    before = velocities(flow)
    after = velocities(shaken(flow))
    assert (after - before).abs().max() > 0.1
    save_weights(flow, tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "tuned.safetensors").keys() == flow.weights().keys()
    other = load_text_to_image(folder, PROMPTS, adapter=adapter).flow
    assert torch.equal(velocities(other), before)
    assert torch.equal(velocities(load_weights(other, tmp_path / "tuned.safetensors")), after)
    kind = None if adapter is not None else ADAPTER
    with pytest.raises(CheckpointError, match=r"tuned.safetensors: made for another network"):
        load_weights(load_text_to_image(folder, PROMPTS, adapter=kind).flow, tmp_path / "tuned.safetensors")


ALL_LAYERS = AdapterConfig(rank=3, alpha=1.5, targets=["to_q", "to_out.0", "conv1", "proj_in", "linear_2"])


@pytest.mark.parametrize("adapter", [ADAPTER, ALL_LAYERS], ids=["attention", "all layers"])
def test_diffusers_loads_our_adapters(folder, tmp_path, adapter):
    """Into a pipeline of its own, and into a denoiser, with the scale: the velocities are ours."""
    flow = shaken(load_text_to_image(folder, PROMPTS, adapter=adapter).flow)
    save_weights(flow, tmp_path / "tuned.safetensors")
    ours = velocities(flow)
    plain = load_text_to_image(folder, PROMPTS).flow
    before = velocities(plain)
    assert (ours - before).abs().max() > 0.1
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name="tuned.safetensors")
    plain.denoiser.load_lora_adapter(tmp_path, weight_name="tuned.safetensors", prefix="unet")
    torch.testing.assert_close(velocities(plain), ours, rtol=1e-5, atol=1e-5)
    plain.denoiser = pipeline.unet
    torch.testing.assert_close(velocities(plain), ours, rtol=1e-5, atol=1e-5)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(velocities(plain), before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, r"the alpha 4\.0, and the configuration's key adapter\.alpha is 2\.0"),
        ({"rank": 3}, r"the rank 2, and the configuration's key adapter\.rank is 3"),
        ({"targets": ["to_q"]}, r"the targets .*'to_v'.*, and the configuration's key adapter\.targets"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(folder, tmp_path, changes, message):
    save_weights(load_text_to_image(folder, PROMPTS, adapter=ADAPTER).flow, tmp_path / "tuned.safetensors")
    other = load_text_to_image(folder, PROMPTS, adapter=ADAPTER.model_copy(update=changes)).flow
    with pytest.raises(CheckpointError, match=rf"tuned\.safetensors: .*{message}"):
        load_weights(other, tmp_path / "tuned.safetensors")
    same = ADAPTER.model_copy(update={"targets": ADAPTER.targets[::-1]})
    load_weights(load_text_to_image(folder, PROMPTS, adapter=same).flow, tmp_path / "tuned.safetensors")


def test_an_adapter_without_its_settings_is_refused(folder, tmp_path):
    """As files were written once, which had peft's inner names and no scale."""
    flow = load_text_to_image(folder, PROMPTS, adapter=ADAPTER).flow
    old = {n: t.clone() for n, t in flow.denoiser.state_dict().items() if "lora_" in n}
    save_file(old, tmp_path / "old.safetensors")
    with pytest.raises(
        CheckpointError, match=r"old\.safetensors: .*does not say the rank, scale and targets"
    ):
        load_weights(flow, tmp_path / "old.safetensors")


def test_targets_that_no_layer_has_are_refused(folder):
    with pytest.raises(ConfigError, match=r"key adapter.targets: .*to_nothing"):
        load_text_to_image(folder, PROMPTS, adapter=AdapterConfig(rank=2, alpha=2, targets=["to_nothing"]))


def gradients(loaded: TextToImage) -> list[Tensor]:
    """Of the brightness of images made of velocities, by the latents and what is tuned."""
    flow = loaded.flow
    parameters = [p.requires_grad_(True) for p in flow.tunable()]
    x = starts(torch.Generator().manual_seed(1)).requires_grad_(True)
    context = flow.context_of(torch.arange(len(PROMPTS)))
    images = loaded.decode(flow.velocity(x, torch.tensor(0.4), context))
    return list(torch.autograd.grad(images.square().mean(), [x, *parameters]))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["whole", "adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(folder, adapter):
    found, runs = [], []
    for on in (False, True):
        compute, guidance = ComputeConfig(gradient_checkpointing=on), GuidanceConfig(sampling=2)
        loaded = load_text_to_image(folder, PROMPTS, guidance, compute=compute, adapter=adapter)
        shaken(loaded.flow)
        decoder, calls = loaded.decode.args[0].decoder, Counter()
        for module in (loaded.flow.denoiser.mid_block.resnets[1], decoder.up_blocks[0]):
            # Before it runs: a second run ends as soon as it has given all that is needed.
            module.register_forward_pre_hook(lambda module, _, calls=calls: calls.update([module]))
        found.append(gradients(loaded))
        runs.append(sorted(calls.values()))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-5)
    assert runs == [[1, 1], [2, 2]]  # the activations of both were computed again


# Folders and prompts that cannot be used.


@pytest.mark.parametrize(
    "missing",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_a_missing_part_is_named(copied, missing):
    (copied / missing).unlink()
    part = missing.split("/")[0]
    with pytest.raises(CheckpointError, match=rf"^{copied}/{part}"):
        load_text_to_image(copied, PROMPTS)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=rf"^{tmp_path}/none: no such folder; key model.pipeline.path must"
    ):
        load_text_to_image(tmp_path / "none", PROMPTS)


def test_a_vocabulary_without_its_merges_is_refused(folders, tmp_path):
    copied = Path(shutil.copytree(folders["published"], tmp_path / "published"))
    (copied / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=rf"^{copied}/tokenizer: cannot be read"):
        load_text_to_image(copied, PROMPTS)


@pytest.mark.parametrize(
    "damaged",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_a_damaged_part_is_named(copied, damaged):
    whole = (copied / damaged).read_bytes()
    (copied / damaged).write_bytes(whole[: len(whole) // 2])
    part = damaged.split("/")[0]
    with pytest.raises(CheckpointError, match=rf"^{copied}/{part}.*; restore"):
        load_text_to_image(copied, PROMPTS)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    ("weights", "pickled"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder/model.safetensors", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_not_opened(copied, weights, pickled):
    (copied / weights).unlink()
    (copied / weights).with_name(pickled).write_bytes(pickle.dumps(Bomb()))
    message = rf"^{(copied / weights).parent}: cannot be read as a .* with weights as safetensors"
    with pytest.raises(CheckpointError, match=message):
        load_text_to_image(copied, PROMPTS)


@pytest.mark.parametrize(
    ("weights", "lost"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
    ],
)
def test_weights_that_are_lacking_are_not_drawn_at_random(copied, weights, lost):
    tensors = load_file(copied / weights)
    del tensors[lost]
    save_file(tensors, copied / weights, {"format": "pt"})
    message = (
        rf"^{(copied / weights).parent}: its safetensors lack 1 of the weights of a .*, the first {lost};"
    )
    with pytest.raises(CheckpointError, match=message):
        load_text_to_image(copied, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"text": {"width": 32}}, r"cross_attention_dim is 16, and the text encoder's features are 32"),
        ({"autoencoder": {"latent_channels": 8}}, r"in_channels is 4, and the latents' channels are 8"),
    ],
)
def test_parts_of_different_models_are_refused(copied, changes, key):
    config = EmbeddedConfig.model_validate(merge(CONFIG.model_dump(), changes))
    if "text" in changes:
        tokenizer = build_pipeline(CONFIG).tokenizer
        build_text_encoder(config.text, tokenizer, 0).save_pretrained(copied / "text_encoder")
    else:
        build_autoencoder(config, 0).save_pretrained(copied / "vae")
    with pytest.raises(CheckpointError, match=rf"^{copied}/unet/config.json: {key}; give the folder"):
        load_text_to_image(copied, PROMPTS)


def test_a_prompt_that_is_too_long_is_cut_and_a_warning_says_so(folder, caplog):
    long = "a red bridge " * 10
    with caplog.at_level(logging.WARNING, logger="flowtilt"):
        loaded = load_text_to_image(folder, ["a red bridge", long])
    (record,) = [r for r in caplog.records if r.name.startswith("flowtilt")]
    tokens = len(loaded_tokens(folder, long))
    assert tokens > 30
    assert record.getMessage() == (f"prompt {long!r} has {tokens} tokens; the text encoder sees 12 of them")
    assert loaded.flow.prompts.table.shape == (2, 12, 16)


def loaded_tokens(folder: Path, prompt: str) -> list[int]:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return [
        tokenizer.bos_token_id,
        *tokenizer.encode(prompt, add_special_tokens=False),
        tokenizer.eos_token_id,
    ]


# Adjoint Matching.


class Brightness(Reward):
    """Mean colour of the decoded image."""

    def __init__(self, loaded: TextToImage) -> None:
        self.decode = loaded.decode

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.decode(x).flatten(1).mean(1)


KL_WEIGHT = 0.001
SETTINGS = AdjointMatchingSettings(
    target="step", updates=1, batch=4, pool=4, steps=5, learning_rate=1e-3, warmup=0, ramp=0, last_share=1.0
)


def first_loss(loaded: TextToImage, scale: float) -> float:
    """The loss before any update, by automatic differentiation of one mean after another.

    Args:
        loaded: the model.
        scale: guidance of the model whose means they are.
    """
    flow, generator = loaded.flow, torch.Generator().manual_seed(3)
    context = flow.draw_context(SETTINGS.batch, generator)
    states = sample_sde(flow, SETTINGS.batch, SETTINGS.steps, generator, context)
    steps, times = memoryless_steps(flow, SETTINGS.steps), flow.time_grid(SETTINGS.steps)
    adjoint = -Brightness(loaded).gradient(states[-1], context) / KL_WEIGHT
    squares = []
    for k in reversed(range(SETTINGS.steps)):
        noise = steps[k].noise
        if noise == 0:  # the last step has that of the process it is a step of
            noise = math.sqrt(steps[k].velocity * float(flow.path.eta(torch.tensor(times[k]).double())))
        squares.append(float(adjoint.square().sum()) * noise**2)
        x = states[k].clone().requires_grad_(True)
        v = flow.velocity(x, torch.tensor(times[k]), replace(context, guidance=scale))
        mean = steps[k].state * x + steps[k].velocity * v
        adjoint = torch.autograd.grad((mean * adjoint).sum(), x)[0]
    return sum(squares) / SETTINGS.batch  # a step is one over the number of steps, which their mean undoes


def solved(loaded: TextToImage, settings: AdjointMatchingSettings) -> Solution:
    tilt = RewardVariation(Brightness(loaded))
    return solve(loaded.flow, tilt, KL_WEIGHT, settings, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["whole", "adapter"])
@pytest.mark.parametrize(
    ("guidance", "passes"),
    # 4 trajectories of 5 steps: 20 forward, 4 pulled back through 4 steps at twice the cost and one forward,
    # 20 trained on at thrice the cost; each once more where it is guided.
    [({"sampling": 3}, 2 * 20 + 36 + 60), ({"sampling": 3, "adjoint": 2, "control": 2}, 2 * (20 + 36 + 60))],
    ids=["sampling", "everywhere"],
)
@pytest.mark.slow_after(1)
def test_adjoint_matching_goes_through_a_loaded_model(folder, guidance, passes, adapter):
    loaded = load_text_to_image(folder, PROMPTS, GuidanceConfig.model_validate(guidance), adapter=adapter)
    before = {name: tensor.clone() for name, tensor in loaded.flow.denoiser.state_dict().items()}
    solution = solved(loaded, SETTINGS)
    (row,) = solution.history
    assert row["loss"] == pytest.approx(first_loss(loaded, guidance.get("adjoint", 1)), rel=1e-4)
    assert row["path_kl"] == pytest.approx(0, abs=1e-6)
    assert row["network_passes"] == passes
    after = solution.model.denoiser.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    tunable = {id(p) for p in loaded.flow.tunable()}
    tuned = {name for name, p in loaded.flow.denoiser.named_parameters() if id(p) in tunable}
    assert moved <= tuned
    assert len(moved) > len(tuned) / 3
    for name, tensor in loaded.flow.denoiser.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.fixture
def double() -> Iterator[None]:
    """With 64 bits by default: Adam's first steps have the gradients' signs, and rounding decides some."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_double(loaded: TextToImage) -> TextToImage:
    flow, known = loaded.flow.double(), loaded.flow.prompts
    flow.use_prompts(known.table.double(), known.empty.double())
    loaded.decode.args[0].double()
    return loaded


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["whole", "adapter"])
@pytest.mark.slow_after(1)
def test_micro_batches_change_nothing(folder, double, adapter):
    """In two updates on the same trajectories, with gradients of all together and of one after another."""
    guidance = GuidanceConfig(sampling=3, adjoint=3, control=3)
    loaded = in_double(load_text_to_image(folder, PROMPTS, guidance, adapter=adapter))
    rate = 1e-4  # at ten times as much the second update is given up: the model has moved too far
    settings = replace(SETTINGS, updates=2, passes=2, last_share=0.4, rest_share=0.7, learning_rate=rate)
    together, apart = (solved(loaded, replace(settings, micro_batch=m)) for m in (None, 1))
    for one, other in zip(together.history, apart.history, strict=True):
        for column in ("loss", "gradient_norm", "path_kl", "network_passes"):
            assert other[column] == pytest.approx(one[column], rel=1e-9, abs=1e-12), column
    assert together.history[1]["path_kl"] > 1e-3
    whole, parts = together.model.weights(), apart.model.weights()
    assert max(float((t - whole[name]).abs().max()) for name, t in loaded.flow.weights().items()) > rate
    assert max(float((t - whole[name]).abs().max()) for name, t in parts.items()) < 1e-6 * rate
