"""How well images fit texts, by a model of open_clip that has features of both, such as CLIP."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError, check_loaded
from flowtilt.files import read_json
from flowtilt.pipeline.configuration import ConfigError

log = logging.getLogger(__name__)

CHUNK = 256
"""Most images or prompts that go through a network together."""

SETTINGS_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""Of a folder; open_clip takes the first that is there before it looks at any other file."""


def fit(images: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """Images in [-1, 1] on a square of ``size`` pixels: the shorter side is scaled, the longer cut evenly.

    This is what torchvision's ``Resize`` and ``CenterCrop`` do to Pillow's images, but for the rounding
    to 8 bits: pixels that fall together are averaged, along rows first, and after rows and columns each
    the colours beyond the range, which bicubic interpolation makes at edges, are cut off. (Pillow takes
    the columns of some images first that are not square.) Images of the right size are not changed.

    Args:
        images: (n, 3, height, width).
        interpolation: ``bicubic`` or ``bilinear``.

    Returns:
        Of shape (n, 3, size, size), differentiable.

    Raises:
        ValueError: for images without pixels, or no size.
    """
    short = min(images.shape[-2:])
    if short < 1 or size < 1:
        raise ValueError(f"images {tuple(images.shape)} cannot be made to fit {size} pixels")
    if short != size:
        height, width = (size * side // short for side in images.shape[-2:])
        for scaled in ((images.shape[-2], width), (height, width)):
            images = F.interpolate(images, scaled, mode=interpolation, antialias=True).clamp(-1, 1)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


class AlignmentModel(nn.Module):
    """Unit features of images and of texts, and their cosine similarities.

    The network is frozen. Images are cast to the precision of the network, which is float32 unless the
    module is moved to another one.

    Args:
        preprocessing: what open_clip says of the images that it takes: ``size``, ``mean``, ``std`` of
            colours in [0, 1], and optionally ``interpolation`` and ``resize_mode``.

    Raises:
        ValueError: if the model takes images that are not square.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, tokenizer: Any, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        size = preprocessing["size"]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(f"a model of square images is needed; this one takes {tuple(size)} pixels")
        self.size: int = sides.pop()
        bilinear = preprocessing.get("interpolation") == "bilinear"
        self.interpolation = "bilinear" if bilinear else "bicubic"
        self.resize_mode: str = preprocessing.get("resize_mode") or "shortest"
        for name in ("mean", "std"):
            colours = torch.as_tensor(preprocessing[name], dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, colours, persistent=False)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features of images, shape (n, embedding), differentiable with respect to them.

        Args:
            images: in [-1, 1], (n, 3, height, width); another size than the model's is made to :func:`fit`.

        An image with a pixel that is not finite has features NaN.

        Raises:
            ValueError: for another shape, or for images that are not square where the model does not
                scale the shorter side to its own.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"expected images (n, 3, height, width), got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height != width and self.resize_mode != "shortest":
            raise ValueError(
                f"the model brings images to its size by {self.resize_mode!r}, which is only done for "
                f"square ones here; got {height} x {width} pixels"
            )
        return torch.cat([self._image_features(part) for part in images.split(CHUNK)])

    def _image_features(self, images: Tensor) -> Tensor:
        fitting = fit(images.to(self.mean.dtype), self.size, self.interpolation)
        features: Tensor = self.network.encode_image(  # type: ignore[operator]
            ((fitting + 1) / 2 - self.mean) / self.std, normalize=True
        )
        # An infinite pixel would become a bright one where images are made to fit.
        return features.masked_fill(~finite(images)[:, None], torch.nan)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features of texts, shape (n, embedding), without a graph.

        A prompt of more tokens than the model takes is cut off by its tokenizer, which the log says.

        Raises:
            ValueError: if there is no text.
        """
        if not prompts:
            raise ValueError("features of texts need at least one text")
        warn_of_long(prompts, self._tokens, self.tokenizer.context_length)
        tokens = self.tokenizer(list(prompts)).to(self.mean.device)
        parts = [
            self.network.encode_text(part, normalize=True)  # type: ignore[operator]
            for part in tokens.split(CHUNK)
        ]
        return torch.cat(parts)

    def _tokens(self, prompt: str) -> int:
        """Tokens of a whole prompt with its two ends."""
        if hasattr(self.tokenizer, "encode"):  # open_clip's own
            return len(self.tokenizer.encode(prompt)) + 2
        whole = self.tokenizer.tokenizer(self.tokenizer.clean_fn(prompt), verbose=False)
        return len(whole.input_ids)

    @torch.no_grad()
    def scores_of(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarities of images with their own prompts, shape (n,), without a graph.

        Args:
            features: unit features of the images, (n, embedding); NaN where they are not known.
            prompts: n texts; one that comes again is encoded once.

        Raises:
            ValueError: if there are not as many prompts as images.
        """
        if len(prompts) != len(features):
            raise ValueError(f"each image needs its prompt; got {len(features)} and {len(prompts)} prompts")
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        texts = self.text_features(distinct)[[place[prompt] for prompt in prompts]]
        return similarity(features, texts)


def warn_of_long(
    prompts: Sequence[str], tokens: Callable[[str], int], limit: int, model: str = "model"
) -> None:
    """Say in the log which prompts have more tokens than a model sees."""
    for prompt in dict.fromkeys(prompts):
        if (count := tokens(prompt)) > limit:
            log.warning("prompt %r has %d tokens; the %s sees %d of them", prompt, count, model, limit)


def finite(images: Tensor) -> Tensor:
    """Which images, or features, have finite numbers only, bool (n,)."""
    return images.flatten(1).isfinite().all(1)


def similarity(features: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarities of unit features with those of the texts beside them, (n,). NaN for features
    without a direction, which a network without signal gives: a zero would be a score."""
    return (features * texts).sum(1).masked_fill(~features.any(1) | ~texts.any(1), torch.nan)


@torch.no_grad()
def classify_features(features: Tensor, model: AlignmentModel, names: Sequence[str], template: str) -> Tensor:
    """Zero-shot classes (Radford et al. 2021, section 3.1): those whose prompts are the most similar.

    Args:
        features: unit features of images, (n, embedding).
        template: a prompt with ``{}`` where the name goes.

    Returns:
        Positions in ``names``, long (n,).

    Raises:
        ValueError: if there is no class, the template has no place for its name, or features are not finite
            or all zero.
    """
    bad = ~finite(features) | ~features.any(1)
    if bool(bad.any()):
        raise ValueError(f"{int(bad.sum())} of {len(bad)} images have features of no class: NaN or zero")
    if not names:
        raise ValueError("images cannot be classified without names of classes")
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} where the name of a class goes")
    texts = model.text_features([template.replace("{}", name) for name in names])
    return (features @ texts.T).argmax(1)


# Loading.


def load_alignment(name: str, weights: Path | None = None) -> AlignmentModel:
    """A model of open_clip in float32 on torch's default device, whatever precision its file is in.

    Nothing is ever downloaded.

    Args:
        name: a folder that open_clip reads by ``local-dir:``, which is told by being there or by a slash; or
            a name that open_clip knows, such as ``ViT-B-32``. The name says the architecture only: OpenAI's
            own weights have another activation and belong to names that end in ``-quickgelu``.
        weights: of a name that open_clip knows, as safetensors; a folder has its own.

    Raises:
        CheckpointError: if a file is missing, damaged, or not of this model.
        ConfigError: if open_clip is not installed, does not know the name, or would have to download.
    """
    try:
        import open_clip
    except ModuleNotFoundError:
        raise ConfigError("open_clip is not installed; pip install 'flowtilt[images]'") from None
    if Path(name).is_dir() or "/" in name or os.sep in name:
        if weights is not None:
            raise ConfigError(f"{name}: a folder has its own weights; leave out {weights}")
        source = _check_folder(Path(name))
        network = _network(open_clip, f"local-dir:{name}", None, source)
        try:
            tokenizer = open_clip.get_tokenizer(f"local-dir:{name}")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{name}: no tokenizer that can be read ({error}); make or fetch the folder again"
            ) from None
    else:
        _check_known(open_clip, name)
        source = _check_weights(name, weights)
        network = _network(open_clip, name, str(source), source)
        tokenizer = open_clip.get_tokenizer(name)
    model = AlignmentModel(network, tokenizer, open_clip.get_model_preprocess_cfg(network))
    return model.to(torch.get_default_device())


def _network(open_clip: ModuleType, identifier: str, pretrained: str | None, source: Path) -> nn.Module:
    """The network with its weights, from ``source``; torch's random state is left as it was."""
    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = open_clip.create_model(
                identifier, pretrained, precision="fp32", device="cpu", pretrained_text=False
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{source}: not a complete safetensors file ({error}); delete it and fetch or make it again"
        ) from None
    except RuntimeError as error:
        raise CheckpointError(
            f"{source}: not weights of {identifier.removeprefix('local-dir:')}; "
            f"take those that were made with it ({error})"
        ) from None
    check_loaded(network, [source], "fetch or make it again")
    return network


def _check_folder(folder: Path) -> Path:
    """The weights of a folder that can be read without downloading. Raises CheckpointError if it is not there
    or not complete."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; make or fetch it first, or give a name that open_clip knows"
        )
    settings = folder / SETTINGS_FILE
    if not settings.is_file():
        raise CheckpointError(f"{settings}: no such file; a folder of open_clip has it beside its weights")
    try:
        text = read_json(settings)["model_cfg"]["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{settings}: not a configuration of open_clip ({type(error).__name__}: {error}); "
            "make or fetch the folder again"
        ) from None
    if "hf_model_name" in text:
        raise CheckpointError(
            f"{settings}: the text encoder {text['hf_model_name']} would be read from the model hub; "
            "take a model whose text encoder is open_clip's own"
        )
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder / WEIGHTS_FILES[0]}: no such weights; make or fetch them, and convert those of another "
        "format to safetensors"
    )


def _check_known(open_clip: ModuleType, name: str) -> None:
    settings = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if settings is None:
        raise ConfigError(
            f"{name}: not a model of open_clip; choose one of open_clip.list_models(), or a folder"
        )
    hub = {"hf_model_name", "hf_tokenizer_name"} & settings["text_cfg"].keys()
    if hub or "siglip" in name.lower():
        raise ConfigError(
            f"{name}: its tokenizer or text encoder would be downloaded; save the model as a folder and "
            "give that, or choose one with open_clip's own"
        )


def _check_weights(name: str, weights: Path | None) -> Path:
    if weights is None:
        raise CheckpointError(
            f"{name}: a model without weights; the rule fetch_checkpoint fetches them, or place them as a "
            "safetensors file and give its path"
        )
    if weights.suffix != ".safetensors":
        raise CheckpointError(
            f"{weights}: weights are only read as safetensors, since other formats can run code; "
            "convert the file where you trust it"
        )
    if not weights.is_file():
        raise CheckpointError(
            f"{weights}: no such weights of {name}; the rule fetch_checkpoint fetches them, or place them "
            "there"
        )
    return weights
