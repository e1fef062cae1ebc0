"""The state of a training on disk, from which it goes on exactly where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError, check_finite, save_tensors, tensors_of
from flowtilt.environment import number
from flowtilt.optimiser import Adam
from flowtilt.parallel import processes

SECONDS = "FLOWTILT_STATE_SECONDS"
"""Environment variable: wall time between two states of a training, in seconds; by default 60."""

Row = dict[str, float]


class Resumption:
    """Where a stage keeps the states of what it trains, and how often.

    Args:
        folder: of the files; made for the first one, which a short training never writes.
        of: what is trained, and from what: a state of anything else is not gone on from.
        seconds: wall time between two states; by default what :data:`SECONDS` says.
    """

    def __init__(
        self, folder: Path, of: str, seconds: float | None = None, resumed: Callable[[], None] | None = None
    ) -> None:
        self.folder, self.of, self.resumed = folder, of, resumed
        self.seconds = number(SECONDS, 60.0) if seconds is None else seconds
        self._saved = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for another state."""
        return time.perf_counter() - self._saved > self.seconds

    def slot(self, name: str) -> Slot:
        """The place of one training among those of the stage."""
        return Slot(self, name)

    def written(self) -> None:
        """A state was written: the next one is due later."""
        self._saved = time.perf_counter()

    def remove(self) -> None:
        """Remove all states, when the stage's outputs are there."""
        if processes().leads:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Slot:
    """The place of one training's state."""

    resumption: Resumption
    name: str

    @property
    def path(self) -> Path:
        """The file, safetensors."""
        return self.resumption.folder / f"{self.name}.safetensors"

    def save(self, tensors: Mapping[str, Tensor], history: Sequence[Row], settings: Any = None) -> None:
        """Write tensors and history, by one of the processes; the file appears whole or not at all."""
        if not processes().leads:
            return
        columns = list(history[0]) if history else []
        # Rows are written as CSV in the end, where 3 and 3.0 differ.
        whole = [c for c in columns if all(isinstance(row[c], int) for row in history)]
        rows = torch.tensor([[row[c] for c in columns] for row in history], dtype=torch.float64)
        metadata = {"of": self._fingerprint(settings), "columns": json.dumps(columns)}
        metadata["whole"] = json.dumps(whole)
        named = {**tensors, "history": rows.reshape(len(history), len(columns))}
        save_tensors(named, self.path, metadata)
        self.resumption.written()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], settings: Any = None) -> list[Row] | None:
        """Copy the file's tensors into those of the same names, and return its history; None without a file.

        Raises:
            CheckpointError: if it is not whole, or of another training or network.
        """
        try:
            return self._load(tensors, settings)
        finally:
            processes().wait()  # before the file is written again, all have read the same

    def _load(self, tensors: Mapping[str, Tensor], settings: Any) -> list[Row] | None:
        if not self.path.is_file():
            return None
        anew = "delete it to train from the beginning"
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: not a whole training state ({error}); {anew}") from None
        if metadata.get("of") != self._fingerprint(settings):
            raise CheckpointError(
                f"{self.path}: of a training with other settings or inputs; restore them, or {anew}"
            )
        rows = found.pop("history", torch.zeros(0))
        if {n: (t.dtype, t.shape) for n, t in tensors.items()} != {
            n: (t.dtype, t.shape) for n, t in found.items()
        }:
            raise CheckpointError(f"{self.path}: of the training of another network; {anew}")
        check_finite(found, self.path, anew)
        for name, tensor in found.items():
            tensors[name].copy_(tensor)
        columns, whole = json.loads(metadata["columns"]), set(json.loads(metadata["whole"]))
        if self.resumption.resumed is not None:
            self.resumption.resumed()
        return [
            {c: int(value) if c in whole else value for c, value in zip(columns, row, strict=True)}
            for row in rows.tolist()
        ]

    def discard(self) -> None:
        """Remove the file, if it is there."""
        if processes().leads:
            self.path.unlink(missing_ok=True)

    def _fingerprint(self, settings: Any) -> str:
        return hashlib.sha256(f"{self.resumption.of} {self.name} {settings!r}".encode()).hexdigest()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model, by the names that it has in a state."""
    return {f"model.{name}": tensor.detach() for name, tensor in tensors_of(model).items()}


class TrainingState:
    """Everything that the next update of a training depends on, kept on disk now and then.

    Args:
        generator: of all randomness.
        settings: of the training; a file of other settings is not resumed from.
        slot: where the state is kept; None for nowhere.
        average: decay of the weights' moving average; 0 for none.
        started: ``time.perf_counter()`` when what the training takes time for began; by default now.

    Attributes:
        averages: moving averages of the parameters; empty without them.

    Raises:
        CheckpointError: if there is a file, and it belongs to another training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: Adam,
        generator: torch.Generator,
        settings: Any,
        slot: Slot | None = None,
        average: float = 0.0,
        started: float | None = None,
    ) -> None:
        self.model, self.optimiser, self.generator = model, optimiser, generator
        self.settings, self.slot, self.decay = settings, slot, average
        self.averages = [p.detach().clone() for p in (optimiser.parameters if average else [])]
        self.history: list[Row] = []
        self._started = time.perf_counter() if started is None else started
        self._resume()

    def _resume(self) -> None:
        if self.slot is None:
            return
        tensors = self.tensors()
        rows = self.slot.load(tensors, self.settings)
        if rows is not None:
            self.history[:] = rows
            self.generator.set_state(tensors["random"])
            self._started = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0)

    def seconds(self) -> float:
        """Of training, those before an interruption included."""
        return time.perf_counter() - self._started

    def add(self, row: Row, progress: Callable[[Row], None] | None = None, whole: bool = True) -> None:
        """Take an update's row into the history, and keep the state if it is time to.

        Args:
            whole: whether the next update depends on nothing but the state.
        """
        self.history.append(row)
        if progress is not None:
            progress(row)
        if whole and self.slot is not None and self.slot.resumption.due():
            self.save()

    def save(self) -> None:
        """Keep the state now, if it is kept at all."""
        if self.slot is not None:
            self.slot.save(self.tensors(), self.history, self.settings)

    def finish(self) -> None:
        """Keep the last state of a training that was long enough for one before."""
        if self.slot is not None and self.slot.path.is_file():
            self.save()

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
        """All but the history, by name; the random state apart, these are the tensors themselves."""
        lists = {
            "mean": self.optimiser.means,
            "square": self.optimiser.squares,
            "updates": self.optimiser.updates,
            "average": self.averages,
        }
        named = {f"{name}.{i}": tensor for name, some in lists.items() for i, tensor in enumerate(some)}
        return named | weights_of(self.model) | {"random": self.generator.get_state()}
