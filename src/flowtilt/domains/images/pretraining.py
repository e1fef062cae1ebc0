"""Training of the embedded text-to-image model and of its CLIP on the drawn images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from flowtilt.control.base import Progress
from flowtilt.devices import generator_of
from flowtilt.domains.images import build
from flowtilt.domains.images.bridges import DESIGNS, BridgeSet, bridge_set, describe
from flowtilt.domains.images.model import LatentFlow, Prompted
from flowtilt.domains.images.pipeline import schedule_of
from flowtilt.domains.images.sampling import as_images
from flowtilt.domains.images.sections import BridgesConfig, EmbeddedConfig
from flowtilt.model import Context, FlowModel
from flowtilt.pipeline.sections import FitConfig
from flowtilt.pretraining import PretrainingSettings, fit, fit_flow
from flowtilt.resuming import Resumption

History = list[dict[str, float]]

CHUNK = 256
"""Images that go through a network together where no gradient is kept."""


def settings_of(config: FitConfig) -> PretrainingSettings:
    return PretrainingSettings(**config.model_dump(), margin=0.0)


def _drawn(config: BridgesConfig, held_out: int = 0) -> BridgeSet:
    """The images that the models are trained on, or so many that none was."""
    return bridge_set(held_out or config.count, config.seed + bool(held_out), config.size)


def tokens_of(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers of captions, padded and cut to the tokenizer's length, long (n, length)."""
    found = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return found.input_ids


# ---------------------------------------------------------------------------- the autoencoder


def train_autoencoder(
    autoencoder: AutoencoderKL,
    images: Tensor,
    config: EmbeddedConfig,
    resumption: Resumption,
    progress: Progress | None = None,
) -> History:
    """Train it in place by the mean absolute error and a KL divergence.

    Args:
        images: in [-1, 1], (n, 3, size, size).
    """
    own = config.autoencoder
    generator = generator_of(build.NAME, "autoencoder")

    def loss() -> Tensor:
        x = images[torch.randint(len(images), (own.fit.batch,), generator=generator)]
        latents = autoencoder.encode(x).latent_dist
        drawn = latents.sample(generator)
        error = (autoencoder.decode(drawn).sample - x).abs().mean()
        return error + own.kl_weight * latents.kl().mean() / drawn[0].numel()

    return fit(autoencoder, loss, settings_of(own.fit), generator, progress, resumption.slot("autoencoder"))


@dataclass(frozen=True)
class Latents:
    """Normal distributions of images' latents, as the autoencoder gives them.

    Attributes:
        mean: (n, channels, side, side).
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, autoencoder: AutoencoderKL, images: Tensor) -> Latents:
        """Of images in [-1, 1], (n, 3, size, size)."""
        found = [autoencoder.encode(part).latent_dist for part in images.split(CHUNK)]
        return cls(torch.cat([one.mean for one in found]), torch.cat([one.std for one in found]))

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """One latent of each of the images at ``index``."""
        mean = self.mean[index]
        return mean + self.deviation[index] * torch.randn(mean.shape, generator=generator)

    @property
    def scale(self) -> float:
        """What they are multiplied by to have a mean square of one."""
        second = self.mean.double().square().mean() + self.deviation.double().square().mean()
        return round(float(1 / second.sqrt()), 5)


def refine_decoder(
    autoencoder: AutoencoderKL,
    images: Tensor,
    latents: Latents,
    config: FitConfig,
    resumption: Resumption,
    progress: Progress | None = None,
) -> History:
    """Train the decoder alone by the mean absolute error, in place: the denoiser's latents stay as they are.

    Args:
        images: in [-1, 1], (n, 3, size, size).
    """
    generator = generator_of(build.NAME, "decoder")
    decoder = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder])

    def loss() -> Tensor:
        index = torch.randint(len(images), (config.batch,), generator=generator)
        found = autoencoder.decode(latents.draw(index, generator)).sample
        return (found - images[index]).abs().mean()

    return fit(decoder, loss, settings_of(config), generator, progress, resumption.slot("decoder"))


# ------------------------------------------------------------------------------- the denoiser


class Captioned(FlowModel):
    """A flow together with the text encoder that makes its contexts, to train both; contexts are tokens."""

    def __init__(self, flow: LatentFlow, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.flow, self.text_encoder = flow, text_encoder
        self.path = flow.path

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return self.flow.prior(count, generator)

    def _prompted(self, tokens: Tensor) -> Prompted:
        table = self.text_encoder(tokens).last_hidden_state
        return Prompted(torch.arange(len(tokens)), table, table[0])

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        return self.flow.velocity(x, t, self._prompted(context))

    def matching_residual(self, x1: Tensor, x0: Tensor, t: Tensor, context: Context = None) -> Tensor:
        return self.flow.matching_residual(x1, x0, t, self._prompted(context))


def train_denoiser(
    pipeline: StableDiffusionPipeline,
    latents: Latents,
    captions: Sequence[str],
    config: EmbeddedConfig,
    resumption: Resumption,
    progress: Progress | None = None,
) -> History:
    """Train the pipeline's denoiser and text encoder in place, on latents of its autoencoder."""
    scale = pipeline.vae.config.scaling_factor
    scaled = Latents(scale * latents.mean, scale * latents.deviation)  # in units of the denoiser
    tokens, empty = tokens_of(pipeline.tokenizer, captions), tokens_of(pipeline.tokenizer, [""])[0]

    def source(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents of the images with their captions' tokens; some captions are left empty."""
        index = torch.randint(len(tokens), (count,), generator=generator)
        drawn = scaled.draw(index, generator)
        left_empty = torch.rand(count, generator=generator) < config.denoiser.empty_prompts
        return drawn, torch.where(left_empty[:, None], empty, tokens[index])

    channels, height, width = latents.mean.shape[1:]
    shape = (channels, height, width)
    flow = LatentFlow(pipeline.unet, schedule_of(pipeline.scheduler), shape)
    model = Captioned(flow, pipeline.text_encoder)
    generator, slot = generator_of(build.NAME, "denoiser"), resumption.slot("denoiser")
    return fit_flow(model, source, settings_of(config.denoiser.fit), generator, progress, slot)


def train_pipeline(
    config: EmbeddedConfig, resumption: Resumption, progress: Progress | None = None
) -> tuple[StableDiffusionPipeline, dict[str, History]]:
    """The embedded text-to-image model, trained, and the history of each of its trainings by name."""
    data = _drawn(config.bridges)
    images = as_images(data.images)
    pipeline = build.build_pipeline(config)
    histories = {"autoencoder": train_autoencoder(pipeline.vae, images, config, resumption, progress)}
    latents = Latents.of(pipeline.vae, images)
    pipeline.vae.register_to_config(scaling_factor=latents.scale)
    refine = config.autoencoder.refine
    if refine is not None:
        histories["decoder"] = refine_decoder(pipeline.vae, images, latents, refine, resumption, progress)
    histories["denoiser"] = train_denoiser(pipeline, latents, data.captions, config, resumption, progress)
    return pipeline, histories


# ------------------------------------------------------------------------------ the alignment


def contrastive_loss(images: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross entropy (Radford et al. 2021, figure 3), ().

    Args:
        images: unit features, (n, embedding).
        captions: unit features of their captions, (n, embedding).
    """
    logits = scale * images @ captions.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_alignment(
    config: EmbeddedConfig, resumption: Resumption, progress: Progress | None = None
) -> tuple[Any, dict[str, History]]:
    """The embedded CLIP, trained, and the history of its training."""
    own = config.alignment
    data = _drawn(config.bridges)
    images, tokens = as_images(data.images), tokens_of(build.build_tokenizer(config.text), data.captions)
    model = build.build_clip(config)
    generator = generator_of(build.NAME, "alignment")

    def loss() -> Tensor:
        index = torch.randint(len(images), (own.fit.batch,), generator=generator)
        found = model(images[index], tokens[index])
        with torch.no_grad():  # as CLIP's authors do
            model.logit_scale.clamp_(0, math.log(100))
        return contrastive_loss(*found)

    history = fit(model, loss, settings_of(own.fit), generator, progress, resumption.slot("alignment"))
    return model, {"alignment": history}


# ------------------------------------------------------------------------------------- checks


@torch.no_grad()
def check_autoencoder(autoencoder: AutoencoderKL, config: EmbeddedConfig, count: int) -> dict[str, float]:
    """Peak signal-to-noise ratio of images that it was not trained on, in decibels."""
    images = as_images(_drawn(config.bridges, count).images)
    parts = [
        (autoencoder(part).sample.clamp(-1, 1) - part).square().mean((1, 2, 3))
        for part in images.split(CHUNK)
    ]
    return {"autoencoder_psnr": float((10 * torch.log10(4 / torch.cat(parts))).mean())}


@torch.no_grad()
def check_alignment(model: Any, config: EmbeddedConfig, count: int) -> dict[str, float]:
    """How well the CLIP tells the designs of images apart that it was not trained on.

    Returns:
        ``design_accuracy``, the mean over designs of the share of their images that are closest to the
        caption of their own, and ``cosine``, the mean similarity of images with their full captions.
    """
    data = _drawn(config.bridges, count)
    tokenizer = build.build_tokenizer(config.text)
    features = torch.cat(
        [model.encode_image(part, normalize=True) for part in as_images(data.images).split(CHUNK)]
    )
    names = list(DESIGNS)
    classes = model.encode_text(tokens_of(tokenizer, [f"a {name} bridge" for name in names]), normalize=True)
    found = (features @ classes.T).argmax(1)
    own = torch.tensor([names.index(bridge.design) for bridge in data.bridges])
    right = [float((found[own == k] == k).float().mean()) for k in own.unique().tolist()]
    described = [describe(bridge) for bridge in data.bridges]
    captions = torch.cat(
        [
            model.encode_text(tokens_of(tokenizer, described[i : i + CHUNK]), normalize=True)
            for i in range(0, count, CHUNK)
        ]
    )
    return {"design_accuracy": float(np.mean(right)), "cosine": float((features * captions).sum(1).mean())}
