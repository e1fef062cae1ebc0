"""Model weights on disk, as safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowtilt.files import atomic_path
from flowtilt.model import FlowModel

Module = TypeVar("Module", bound=nn.Module)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the fix."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors; the file appears whole or not at all.

    Raises:
        OSError: if it cannot be written, as on a full disk.
    """
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(whole, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


def save_weights(model: nn.Module, path: Path) -> None:
    """Write what training changes of a model, with the header that it asks for, by :func:`save_tensors`."""
    header = model.header() if isinstance(model, FlowModel) else {}
    save_tensors(tensors_of(model), path, header or None)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model, by name: the tensors themselves."""
    return model.weights() if isinstance(model, FlowModel) else model.state_dict()


def load_weights(model: Module, path: Path) -> Module:
    """Load weights into ``model`` and return it, frozen.

    Raises:
        CheckpointError: if the file is missing, cut short, or made for another network.
    """
    remake = "delete it and run the workflow again, which makes it anew"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run the stage that writes it first")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); {remake}") from None
    if isinstance(model, FlowModel):
        try:
            model.check_header(header)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: made for another network: {error}; make the configuration match, or {remake}"
            ) from None
    own = tensors_of(model)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        first = differing[0]
        raise CheckpointError(
            f"{path}: made for another network: {first} is {found.get(first, 'absent')} in the file "
            f"and {expected.get(first, 'absent')} in the configured one; "
            f"set the section network of the configuration to match, or {remake}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model.requires_grad_(False)


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
