"""Rewards of images with their prompts, as functions of latents."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError, check_loaded, read_tensors
from flowtilt.domains.images.alignment import CHUNK, AlignmentModel, finite, fit, similarity, warn_of_long
from flowtilt.domains.images.model import Prompted
from flowtilt.files import one_line
from flowtilt.model import Context
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.rewards import Reward

log = logging.getLogger(__name__)

_AGAIN = "delete it and convert the weights again"

Decode = Callable[[Tensor], Tensor]
"""Latents (n, channels, height, width) to images in [-1, 1], (n, 3, pixels, pixels), differentiable."""


class DecodedReward(Reward):
    """A reward of a decoded image with the prompt of its sample, whose context is :class:`Prompted`.

    A latent that is not finite has the value NaN, even where the decoder makes an image of it, and so has
    one whose image is not finite.

    Args:
        prompts: that positions in the context mean, in the order of the context's table.
    """

    def __init__(self, decode: Decode, prompts: Sequence[str]) -> None:
        self.decode, self.prompts = decode, tuple(prompts)

    @abstractmethod
    def score(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Rewards (batch,) of images in [-1, 1] with the prompts at positions, long (batch,)."""

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        """Rewards of latents, shape (batch,). Raises ValueError if the context does not say which of the
        prompts each sample has."""
        prompt = self._positions(len(x), context)
        images = self.decode(x)
        values = self.score(images, prompt)
        return values.masked_fill(~(finite(x) & finite(images)), torch.nan)

    def _positions(self, count: int, context: Context) -> Tensor:
        name = type(self).__name__
        if not isinstance(context, Prompted):
            raise ValueError(f"{name} needs the prompts of its samples; give their context, a Prompted")
        prompt = context.prompt
        if prompt.shape != (count,):
            raise ValueError(f"{name} needs a prompt a sample; got {tuple(prompt.shape)} for {count} samples")
        known = len(self.prompts)
        if bool(((prompt < 0) | (prompt >= known)).any()):
            raise ValueError(
                f"{name} was made with {known} prompts, and a sample has that at position "
                f"{int(prompt.max() if prompt.max() >= known else prompt.min())}; make it with all of them"
            )
        return prompt


class ClipReward(DecodedReward):
    """Cosine similarity of image and prompt in the features of a CLIP, from -1 to 1.

    Args:
        prompts: see :class:`DecodedReward`; their features are computed once, here.
    """

    def __init__(self, decode: Decode, model: AlignmentModel, prompts: Sequence[str]) -> None:
        super().__init__(decode, prompts)
        self.model = model
        self.texts = model.text_features(self.prompts)

    def score(self, images: Tensor, prompt: Tensor) -> Tensor:
        return similarity(self.model.image_features(images), self.texts[prompt])


class ImageReward(DecodedReward):
    """Human preference as learned by ImageReward (Xu et al. 2023), in standard deviations of its images.

    This needs the package image-reward, which pulls in old releases of others. It has been tested with a
    stand-in of the same interface only, never with the package and its weights. Making it, the package
    reads the tokenizer ``bert-base-uncased`` from the local cache of the model hub, or fetches it from there.

    Args:
        prompts: see :class:`DecodedReward`; they are tokenised once, here.
        weights: a safetensors file converted from the package's ``ImageReward.pt``. The package's
            ``med_config.json`` lies beside it.

    Raises:
        ConfigError: if the package cannot be imported.
        CheckpointError: if a file is missing, of another format, damaged, or made for another network.
    """

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    """Of colours in [0, 1], over the images that CLIP was trained on."""

    STD = (0.26862954, 0.26130258, 0.27577711)
    """Their standard deviation."""

    SIZE = 224
    """Pixels a side of the images that the network takes."""

    TOKENS = 35
    """Tokens of a prompt that the package looks at when it scores images."""

    def __init__(self, decode: Decode, prompts: Sequence[str], weights: Path) -> None:
        super().__init__(decode, prompts)
        self.network = _load_image_reward(weights)
        tokenizer = self.network.blip.tokenizer  # type: ignore[union-attr]
        tokens = _tokenise(tokenizer, self.prompts, self.TOKENS)
        device = torch.get_default_device()
        self.ids, self.mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def score(self, images: Tensor, prompt: Tensor) -> Tensor:
        parts = zip(images.split(CHUNK), prompt.split(CHUNK), strict=True)
        return torch.cat([self._score(some, own) for some, own in parts])

    def _score(self, images: Tensor, prompt: Tensor) -> Tensor:
        own = next(self.network.parameters())
        mean, std = (own.new_tensor(colours).reshape(-1, 1, 1) for colours in (self.MEAN, self.STD))
        images = ((fit(images.to(own.dtype), self.SIZE) + 1) / 2 - mean) / std
        rewards: Tensor = self.network.score_gard(  # type: ignore[operator]
            self.ids[prompt], self.mask[prompt], images
        )
        return rewards.flatten()


def _tokenise(tokenizer: Any, prompts: Sequence[str], limit: int) -> Any:
    """Tokens padded or cut off to ``limit``; the log says which prompts are cut off."""
    warn_of_long(prompts, lambda prompt: len(tokenizer(prompt).input_ids), limit)
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
    )


def _load_image_reward(weights: Path) -> nn.Module:
    """The network of the package in float32, frozen, on torch's default device."""
    try:
        package = import_module("ImageReward")
    except Exception as error:  # with other releases of what it needs, it fails in other ways too
        raise ConfigError(
            "reward.kind: this reward needs the package image-reward, which cannot be imported "
            f"({one_line(error)}); "
            "pip install image-reward, or choose another kind"
        ) from None
    tensors = _read(weights)
    settings = weights.with_name("med_config.json")
    if not settings.is_file():
        raise CheckpointError(f"{settings}: no such file; place that of the package image-reward there")
    device = torch.get_default_device()
    try:
        network: nn.Module = package.ImageReward(med_config=str(settings), device=device)
    except OSError as error:
        raise CheckpointError(
            f"{settings}: the package image-reward could not make its network ({error}); it needs the "
            "tokenizer bert-base-uncased in the cache of the model hub"
        ) from None
    _take_weights(network, tensors, weights)
    return network.to(device).requires_grad_(False).eval()


def _read(weights: Path) -> dict[str, Tensor]:
    if weights.suffix != ".safetensors":
        raise CheckpointError(
            f"{weights}: weights are only read as safetensors, since a pickle can run code when it is "
            "opened; convert it once, by torch.load(path, weights_only=True) and "
            "safetensors.torch.save_file, and give the path of the new file"
        )
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such weights; convert the package's ImageReward.pt to it")
    return read_tensors(weights, _AGAIN)


def _take_weights(network: nn.Module, tensors: dict[str, Tensor], weights: Path) -> None:
    """Load all parameters; other names in the file are passed over, as the package does with its own file."""
    lacking = sorted(dict(network.named_parameters()).keys() - tensors.keys())
    if lacking:
        raise CheckpointError(
            f"{weights}: made for another network, it lacks {len(lacking)} parameters, the first "
            f"{lacking[0]}; convert the package's ImageReward.pt again"
        )
    try:
        network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{weights}: made for another network ({error}); convert it again") from None
    check_loaded(network, [weights], _AGAIN, network.state_dict().keys())
