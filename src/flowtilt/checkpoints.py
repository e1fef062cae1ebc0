"""Model weights on disk, as safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowtilt.files import atomic_path
from flowtilt.model import FlowModel

Module = TypeVar("Module", bound=nn.Module)


REMAKE = "delete it and run the workflow again, which makes it anew"
FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of weights, in safetensors' words."""


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


def save_weights(model: nn.Module, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write what training changes of a model, with the header that it asks for, by :func:`save_tensors`.

    Args:
        model: whose weights to write.
        path: of the file.
        notes: what else its header says, see :func:`notes_of`.
    """
    header = model.header() if isinstance(model, FlowModel) else {}
    save_tensors(tensors_of(model), path, {**header, **(notes or {})} or None)


def notes_of(path: Path) -> dict[str, str]:
    """What the header of a checkpoint says, by name.

    Raises:
        CheckpointError: if the file is missing or cut short.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run the stage that writes it first")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); {REMAKE}") from None


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model, by name: the tensors themselves."""
    return model.weights() if isinstance(model, FlowModel) else model.state_dict()


def read_tensors(path: Path, remake: str = REMAKE) -> dict[str, Tensor]:
    """Named tensors of a safetensors file; those of floating point are finite.

    Raises:
        CheckpointError: if the file is missing or cut short, or a number in it is not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; run the stage that writes it first")
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); {remake}") from None
    check_finite(tensors, path, remake)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path, remake: str = REMAKE) -> None:
    """Refuse weights with NaN or infinity, whose samples and densities would be none.

    Raises:
        CheckpointError: naming the file and the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; {remake}")


def check_loaded(
    network: nn.Module, files: Iterable[Path], remake: str, taken: Container[str] | None = None
) -> None:
    """Refuse what a library has loaded from foreign files and cast, if it was no weights.

    Weights may be stored in 16, 32 or 64 bits of floating point, whatever the network computes in; integers
    are left to buffers that hold integers, as positions and counts of batches.

    Args:
        files: safetensors.
        taken: names in the files that were taken; all if not given.

    Raises:
        CheckpointError: naming the file and the first tensor of another type, or that is not finite.
    """
    whole = {n.rpartition(".")[2] for n, buffer in network.named_buffers() if not buffer.is_floating_point()}
    path = Path()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if taken is not None and name not in taken:
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATING and name.rpartition(".")[2] not in whole:
                    raise CheckpointError(
                        f"{path}: {name} has the type {kind}, not one of {', '.join(FLOATING)}; {remake}"
                    )
    check_finite(dict(network.named_parameters()), path, remake)


def load_weights(model: Module, path: Path) -> Module:
    """Load weights into ``model`` and return it, frozen.

    Raises:
        CheckpointError: if the file is missing, cut short, made for another network, or holds numbers of
            another type or that are not finite.
    """
    tensors = read_tensors(path)
    if isinstance(model, FlowModel):
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        try:
            model.check_header(header)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: made for another network: {error}; make the configuration match, or {REMAKE}"
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
            f"set the section network of the configuration to match, or {REMAKE}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: {name} has the type {tensor.dtype}, and {own[name].dtype} in the network; convert "
                f"it to that, or {REMAKE}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model.requires_grad_(False)


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
