"""Configuration of the studies of the theory: one validated file each, in ``config/theory``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowtilt.configuration import ConfigError, Count, Positive, Row, Section, merge, read_yaml, validated
from flowtilt.sections import DataConfig

Mass = Annotated[float, Field(gt=0, lt=1)]
Side = Literal["lower", "upper"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]

_FIELDS: dict[str, set[str]] = {
    "expected_reward": {"direction"},
    "entropy": {"weight"},
    "optimal_design": {"weight", "ridge"},
    "kernel_matching": {"weight", "bandwidth", "target"},
    "log_barrier": {"weight", "direction", "budget"},
}


class TargetConfig(Section):
    """A round Gaussian that kernel matching draws the law to."""

    mean: Row
    deviation: Positive


class UtilityConfig(Section):
    """A concave problem ``utility - alpha KL``; which further fields it has depends on the utility.

    See :mod:`flowtilt.theory.utilities` for the fields. ``multiples`` are the KL weights of the steps
    over the smallest that is proven: 1 is the paper's choice, more is a smaller step.
    """

    utility: Literal["expected_reward", "entropy", "optimal_design", "kernel_matching", "log_barrier"]
    alpha: Positive
    weight: Positive | None = None
    direction: Row | None = None
    ridge: Positive | None = None
    bandwidth: Positive | None = None
    target: TargetConfig | None = None
    budget: Positive | None = None
    multiples: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1)] = (1.0,)

    @model_validator(mode="after")
    def _fields_of_utility(self) -> UtilityConfig:
        wanted = _FIELDS[self.utility]
        given = {name for name in set.union(*_FIELDS.values()) if getattr(self, name) is not None}
        if missing := wanted - given:
            raise ValueError(f"{self.utility} needs {' and '.join(sorted(missing))}; add it")
        if extra := given - wanted:
            raise ValueError(f"{self.utility} has no {' or '.join(sorted(extra))}; remove it")
        return self


class SquareConfig(Section):
    """A square grid over ``[-extent, extent]^2`` with ``cells`` cells a side."""

    extent: Positive
    cells: Annotated[int, Field(ge=4, le=64)]


class MirrorDescentConfig(Section):
    """Mirror ascent on a grid against its bounds; see :mod:`flowtilt.theory.mirror_descent`."""

    kind: Literal["mirror_descent"]
    name: str
    title: str
    iterations: Annotated[int, Field(ge=2)]
    grid: SquareConfig
    data: DataConfig
    problems: Annotated[dict[Name, UtilityConfig], Field(min_length=1)]


class RewardLawConfig(Section):
    """A mixture of Gaussians that rewards are drawn from; a deviation of 0 is an atom."""

    weights: Annotated[list[Positive], Field(min_length=1)]
    means: list[float]
    deviations: list[Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _one_of_each(self) -> RewardLawConfig:
        if not len(self.weights) == len(self.means) == len(self.deviations):
            raise ValueError("weights, means and deviations must have one entry per component")
        return self


class TailConfig(Section):
    """A tail problem on a known law of rewards, at one mass for each of its tails."""

    law: RewardLawConfig
    alpha: Positive
    mass: Mass
    tails: Annotated[tuple[Side, ...], Field(min_length=1)] = ("lower", "upper")


class BatchConfig(Section):
    """Offline batches: their sizes, and how many of each.

    Each size gets as many as ``rewards`` rewards allow, within the given limits. Slopes are fitted from
    the size ``fit_from`` on.
    """

    sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=3)]
    rewards: Count
    fewest: Annotated[int, Field(ge=2)]
    most: Count
    fit_from: Count

    @model_validator(mode="after")
    def _enough_to_fit(self) -> BatchConfig:
        if sorted(set(self.sizes)) != self.sizes:
            raise ValueError("sizes must rise")
        if sum(size >= self.fit_from for size in self.sizes) < 3:
            raise ValueError(f"fit_from ({self.fit_from}) leaves fewer than three sizes to fit; lower it")
        return self

    def replicates(self, size: int) -> int:
        """Batches of one size."""
        return min(max(self.rewards // size, self.fewest), self.most)


class DescentConfig(Section):
    """Gradient descent on the right tail's dual: size of the batch, and updates."""

    batch: Annotated[int, Field(ge=2)]
    updates: Annotated[int, Field(ge=20)]


class ShiftConfig(Section):
    """Batches from a shifted model: the reward is a standard normal coordinate, clipped.

    Attributes:
        clip: rewards lie in ``[-clip, clip]``; the bound needs them bounded.
        deltas: shifts of the coordinate's mean; the KL divergence is ``delta^2 / 2``.
    """

    clip: Positive
    alpha: Positive
    mass: Mass
    deltas: Annotated[list[Positive], Field(min_length=1)]


class ThresholdStudyConfig(Section):
    """Thresholds against their exact values; see :mod:`flowtilt.theory.thresholds`."""

    kind: Literal["threshold"]
    name: str
    title: str
    problems: Annotated[dict[Name, TailConfig], Field(min_length=1)]
    batches: BatchConfig
    descent: DescentConfig
    shift: ShiftConfig


TheoryConfig = MirrorDescentConfig | ThresholdStudyConfig
_KINDS: dict[str, type[MirrorDescentConfig] | type[ThresholdStudyConfig]] = {
    "mirror_descent": MirrorDescentConfig,
    "threshold": ThresholdStudyConfig,
}


def load_theory(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TheoryConfig:
    """The study in a file.

    Args:
        path: the YAML file; its ``name`` must be the file's.
        overrides: merged in last.

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    path = Path(path)
    data = merge(read_yaml(path), overrides or {})
    if data.get("name") != path.stem:
        raise ConfigError(
            f"{path}: key name: must be the file's own, {path.stem!r}, got {data.get('name')!r}"
        )
    if data.get("kind") not in _KINDS:
        raise ConfigError(f"{path}: key kind: must be one of {', '.join(_KINDS)} (got {data.get('kind')!r})")
    return validated(_KINDS[data["kind"]], data, path)
