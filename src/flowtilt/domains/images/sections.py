"""Sections of the configuration of text-to-image models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from flowtilt.configuration import Count, NotNegative, Positive, Section

Share = Annotated[float, Field(ge=0, lt=1)]
Channels = Annotated[tuple[Count, ...], Field(min_length=1)]


class BridgesConfig(Section):
    """The drawn set that the embedded models are trained on."""

    count: Count
    """Pictures with captions."""

    size: Annotated[int, Field(gt=0, multiple_of=8)] = 32
    """Pixels a side."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the drawing."""


class FitConfig(Section):
    """One training; see :class:`flowtilt.pretraining.PretrainingSettings`."""

    updates: Count
    """Optimiser steps."""

    batch: Count = 64
    """Pictures an update."""

    learning_rate: Positive = 1e-3
    """Largest learning rate of Adam; a cosine takes it to zero."""

    warmup: Share = 0.02
    """Share of the updates over which the learning rate rises linearly."""

    average: Share = 0.0
    """Decay of the exponential moving average of the weights, which then is the result; 0 for none."""

    gradient_clip: Positive = 1.0
    """Bound on the norm of the parameters' gradient."""


class AutoencoderConfig(Section):
    """The variational autoencoder between pictures and latents, diffusers' AutoencoderKL."""

    channels: Channels
    """Of its levels, the picture's first; each level but the last halves the side."""

    latent_channels: Count = 4
    """Channels of a latent."""

    kl_weight: NotNegative
    """Weight of the latents' KL divergence from noise, a latent channel, beside the mean absolute error."""

    fit: FitConfig
    """Its training."""


class TextConfig(Section):
    """Tokenizer and text encoder, transformers' CLIPTokenizer and CLIPTextModel."""

    merges: Count
    """How many of the merges of CLIP's byte pairs the tokenizer keeps, the first ones of its 48,894."""

    length: Count
    """Tokens of a prompt, with its two ends."""

    width: Count
    """Features of a token."""

    layers: Count
    """Transformer layers."""

    heads: Count
    """Heads of the attention."""


class DenoiserConfig(Section):
    """The denoiser, diffusers' UNet2DConditionModel, trained together with the text encoder."""

    channels: Channels
    """Of its levels, the latent's own first; all but the last attend to the prompt."""

    layers: Count = 1
    """Residual blocks a level."""

    head_width: Count = 32
    """Features of an attention head."""

    empty_prompts: Share = 0.1
    """Share of the captions left empty in training, for guidance."""

    fit: FitConfig
    """Its training."""


class AlignmentConfig(Section):
    """The model of picture and caption together, open_clip's CLIP."""

    embedding: Count
    """Features that pictures and captions share."""

    patch: Count
    """Pixels a side of a patch."""

    width: Count
    """Features of a patch and of a token."""

    layers: Count
    """Transformer layers of either side."""

    heads: Count
    """Heads of the attention."""

    fit: FitConfig
    """Its training."""


class EmbeddedConfig(Section):
    """Small models of the same kinds as Stable Diffusion and CLIP, and how they are trained."""

    bridges: BridgesConfig
    """The pictures."""

    autoencoder: AutoencoderConfig
    """Pictures to latents and back."""

    text: TextConfig
    """Prompts to embeddings."""

    denoiser: DenoiserConfig
    """The flow on latents."""

    alignment: AlignmentConfig
    """Scores of pictures with prompts."""

    @model_validator(mode="after")
    def _fits(self) -> EmbeddedConfig:
        halvings = len(self.autoencoder.channels) + len(self.denoiser.channels) - 2
        if self.bridges.size % 2**halvings:
            raise ValueError(
                f"bridges.size: {self.bridges.size} pixels cannot be halved {halvings} times, as the levels "
                "of autoencoder and denoiser ask for"
            )
        if self.bridges.size % self.alignment.patch:
            raise ValueError(
                f"alignment.patch: {self.bridges.size} pixels are not a multiple of {self.alignment.patch}"
            )
        return self

    @property
    def latent_size(self) -> int:
        """Side of a latent."""
        return self.bridges.size // 2 ** (len(self.autoencoder.channels) - 1)
