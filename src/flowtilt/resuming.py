"""The state of a training on disk, from which it goes on exactly where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError
from flowtilt.files import atomic_path
from flowtilt.optimiser import Adam

COLUMNS = ("update", "loss", "seconds")
"""Of the history."""


class TrainingState:
    """Everything that the next update depends on.

    Args:
        model: in training.
        optimiser: of the model's parameters.
        generator: of all randomness.
        settings: a dataclass with a field ``average``, the decay of the weights' moving average; a file
            of other settings is not resumed from.

    Attributes:
        history: a row of :data:`COLUMNS` an update.
        averages: moving averages of the parameters; empty without them.
    """

    def __init__(self, model: nn.Module, optimiser: Adam, generator: torch.Generator, settings: Any) -> None:
        self.model, self.optimiser, self.generator = model, optimiser, generator
        self.decay: float = settings.average
        self.fingerprint = hashlib.sha256(repr(sorted(asdict(settings).items())).encode()).hexdigest()
        self.history: list[dict[str, float]] = []
        parameters = optimiser.parameters if self.decay else []
        self.averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def average(self, update: int) -> None:
        """Take the parameters after an update into their averages."""
        if self.averages:
            decay = min(self.decay, (update + 1) / (update + 11))
            torch._foreach_lerp_(self.averages, self.optimiser.parameters, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Give the model the averages, if there are any."""
        for parameter, mean in zip(self.optimiser.parameters, self.averages, strict=False):
            parameter.copy_(mean)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averages for its weights, if there are any, for the length of a block."""
        own = [p.detach().clone() for p in self.optimiser.parameters]
        self.use_average()
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.optimiser.parameters, own, strict=True):
                    parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; the history apart, these are the tensors themselves."""
        lists = {
            "mean": self.optimiser.means,
            "square": self.optimiser.squares,
            "updates": self.optimiser.updates,
            "average": self.averages,
        }
        named = {f"{name}.{i}": tensor for name, some in lists.items() for i, tensor in enumerate(some)}
        weights = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        history = torch.tensor([[row[c] for c in COLUMNS] for row in self.history], dtype=torch.float64)
        random = self.generator.get_state()
        return named | weights | {"history": history.reshape(-1, len(COLUMNS)), "random": random}

    def save(self, path: Path) -> None:
        """Write the state; the file appears whole or not at all."""
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(self.tensors(), temporary, {"settings": self.fingerprint})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take over the state of a file.

        Raises:
            CheckpointError: if it is not whole, or belongs to other settings or another network.
        """
        anew = "delete it to train from the beginning"
        try:
            with safetensors.safe_open(path, "pt") as file:
                fingerprint = (file.metadata() or {}).get("settings")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole training state ({error}); {anew}") from None
        if fingerprint != self.fingerprint:
            raise CheckpointError(f"{path}: of a training with other settings; restore them, or {anew}")
        own = self.tensors()
        rows = found.pop("history", None)
        own.pop("history")
        if rows is None or {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in found.items()}:
            raise CheckpointError(f"{path}: of the training of another network; {anew}")
        self.generator.set_state(found.pop("random"))
        for name, tensor in found.items():
            own[name].copy_(tensor)
        self.history[:] = [dict(zip(COLUMNS, row, strict=True)) for row in rows.tolist()]
        for row in self.history:
            row["update"] = int(row["update"])
