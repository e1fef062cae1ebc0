"""The embedded text-to-image model and its CLIP, made from their configuration: untrained, and as folders.

Both are what their libraries read: a folder of diffusers' StableDiffusionPipeline, and one of open_clip.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flowtilt.domains.images.sections import EmbeddedConfig, TextConfig
from flowtilt.files import write_text
from flowtilt.seeding import seed_of

NAME = "bridges"
"""Of the embedded models, for their seeds."""

NORM_GROUPS = 16

WEIGHTS_OF_CLIP = "open_clip_model.safetensors"


@contextmanager
def seeded_weights(part: str, seed: int) -> Iterator[None]:
    """Initial weights from the name of a part, without a trace in torch's own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(NAME, part, "initial weights", seed))
        yield


def build_tokenizer(config: TextConfig) -> CLIPTokenizer:
    """CLIP's own tokenizer with the first of its merges: rarer words fall into more tokens."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        merges = [tuple(line.split()) for line in stream.read().splitlines()[1 : config.merges + 1]]
    characters = list(bytes_to_unicode().values())
    words = [*characters, *(f"{c}</w>" for c in characters), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=config.length)


def build_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    with seeded_weights("text encoder", seed):
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.length,
                projection_dim=config.width,
                hidden_act="quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def build_autoencoder(config: EmbeddedConfig, seed: int) -> AutoencoderKL:
    own = config.autoencoder
    levels = len(own.channels)
    with seeded_weights("autoencoder", seed):
        return AutoencoderKL(
            sample_size=config.bridges.size,
            block_out_channels=own.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=own.latent_channels,
            norm_num_groups=NORM_GROUPS,
        )


def build_denoiser(config: EmbeddedConfig, seed: int) -> UNet2DConditionModel:
    own = config.denoiser
    attending = len(own.channels) - 1
    with seeded_weights("denoiser", seed):
        return UNet2DConditionModel(
            sample_size=config.latent_size,
            in_channels=config.autoencoder.latent_channels,
            out_channels=config.autoencoder.latent_channels,
            block_out_channels=own.channels,
            layers_per_block=own.layers,
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
            cross_attention_dim=config.text.width,
            # The name is diffusers'; what it means is the number of heads.
            attention_head_dim=tuple(channels // own.head_width for channels in own.channels),
            norm_num_groups=NORM_GROUPS,
        )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; its last step leads to data without noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # of leading spacing; diffusers warns without it
        timestep_spacing="trailing",
    )


def build_pipeline(config: EmbeddedConfig, seed: int = 0) -> StableDiffusionPipeline:
    """The whole text-to-image model, untrained."""
    tokenizer = build_tokenizer(config.text)
    return StableDiffusionPipeline(
        vae=build_autoencoder(config, seed),
        text_encoder=build_text_encoder(config.text, tokenizer, seed),
        tokenizer=tokenizer,
        unet=build_denoiser(config, seed),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_clip(config: EmbeddedConfig, folder: Path, weights: nn.Module | None, seed: int = 0) -> None:
    """Write a folder that open_clip reads by ``local-dir:``, with some weights or untrained ones."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(config.text).save_pretrained(folder)
    write_text(folder / "open_clip_config.json", json.dumps(clip_settings(config), indent=1) + "\n")
    model = build_clip(config, seed) if weights is None else weights
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS_OF_CLIP)


def clip_settings(config: EmbeddedConfig) -> dict[str, Any]:
    """What open_clip calls a model's configuration."""
    own = config.alignment
    return {
        "model_cfg": {
            "embed_dim": own.embedding,
            "vision_cfg": {
                "image_size": config.bridges.size,
                "patch_size": own.patch,
                "width": own.width,
                "layers": own.layers,
                "head_width": own.width // own.heads,
            },
            "text_cfg": {
                "context_length": config.text.length,
                "vocab_size": len(build_tokenizer(config.text)),
                "width": own.width,
                "heads": own.heads,
                "layers": own.layers,
                # Of the folder itself, which is where open_clip looks.
                "hf_tokenizer_name": "local",
                "tokenizer_kwargs": {"clean": "lower"},
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
    }


def build_clip(config: EmbeddedConfig, seed: int = 0) -> Any:
    """The model of images and captions, untrained."""
    settings = clip_settings(config)["model_cfg"]
    text = {k: v for k, v in settings["text_cfg"].items() if not k.startswith(("hf_", "tokenizer"))}
    with seeded_weights("alignment", seed):
        return open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text)
