"""Configuration of the studies of the theory: one validated file each, in ``config/theory``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from flowtilt.pipeline.configuration import (
    ConfigError,
    Count,
    Name,
    NoRepeats,
    Positive,
    Row,
    Section,
    ToldApart,
    merge,
    read_yaml,
    validated,
)
from flowtilt.pipeline.sections import DataConfig, TailKey

Mass = Annotated[float, Field(gt=0, lt=1)]
Matrix = Annotated[list[Row], Field(min_length=2, max_length=2)]

_FIELDS: dict[str, set[str]] = {
    "expected_reward": {"direction"},
    "entropy": {"weight"},
    "optimal_design": {"weight", "ridge"},
    "kernel_matching": {"weight", "bandwidth", "target"},
    "log_barrier": {"weight", "direction", "budget"},
}


class TargetConfig(Section):
    """A round Gaussian that kernel matching draws the distribution to."""

    mean: Row
    """Mean of the target distribution, a pair of coordinates."""

    deviation: Positive
    """Its standard deviation along both axes."""


class UtilityConfig(Section):
    """A concave problem ``utility - alpha KL``; which further keys it has depends on the utility.

    The formulas are in :mod:`flowtilt.theory.utilities`.
    """

    utility: Literal["expected_reward", "entropy", "optimal_design", "kernel_matching", "log_barrier"]
    """The concave utility of the distribution p; it says which of the other keys there are."""

    alpha: Positive
    """Weight of the KL divergence from the pretrained distribution, in units of the utility a nat."""

    weight: Positive | None = None
    """Weight of the utility, or of the barrier in ``log_barrier``; for all but ``expected_reward``."""

    direction: Row | None = None
    """Gradient of the linear reward, a pair; for ``expected_reward`` and ``log_barrier``."""

    ridge: Positive | None = None
    """What is added to the diagonal of the information matrix; for ``optimal_design``."""

    bandwidth: Positive | None = None
    """Bandwidth of the Gaussian kernel, in units of the plane; for ``kernel_matching``."""

    target: TargetConfig | None = None
    """The round Gaussian that the distribution is drawn to; for ``kernel_matching``."""

    budget: Positive | None = None
    """What the mean cost must stay below, the cost being half the squared distance from the origin; for
    ``log_barrier``."""

    multiples: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1), NoRepeats] = (1.0,)
    """KL weights of the runs' steps over the smallest that is proven: 1 is the paper's choice, more is a
    smaller step."""

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
    """A square grid."""

    extent: Positive
    """Half the side of the square around the origin."""

    cells: Annotated[int, Field(ge=4, le=64)]
    """Cells along a side."""


class MirrorDescentConfig(Section):
    """Mirror ascent on a grid against its bounds; see :mod:`flowtilt.pipeline.theory.mirror_descent`."""

    kind: Literal["mirror_descent"]
    """Which study this is."""

    name: Name
    """Name of the study: that of its file."""

    title: str
    """Title of its table."""

    iterations: Annotated[int, Field(ge=2)]
    """Iterations of every run."""

    grid: SquareConfig
    """The grid whose cells distributions are vectors of probabilities on."""

    data: DataConfig
    """The pretrained distribution; ``modes`` is not used here."""

    problems: Annotated[dict[Name, UtilityConfig], Field(min_length=1), ToldApart]
    """The problems by name."""


class RewardDistributionConfig(Section):
    """A mixture of Gaussians that rewards are drawn from."""

    weights: Annotated[list[Positive], Field(min_length=1)]
    """Weights of the components; they need not sum to 1."""

    means: list[float]
    """Means of the components, in units of the reward."""

    deviations: list[Annotated[float, Field(ge=0)]]
    """Standard deviations of the components; 0 is an atom."""

    @model_validator(mode="after")
    def _one_of_each(self) -> RewardDistributionConfig:
        if not len(self.weights) == len(self.means) == len(self.deviations):
            raise ValueError("weights, means and deviations must have one entry per component")
        return self


class TailConfig(Section):
    """A tail problem on a known distribution of rewards, at one mass for each of its tails."""

    renamed: ClassVar[Mapping[str, str]] = {"law": "distribution"}

    distribution: RewardDistributionConfig
    """The distribution of the rewards."""

    alpha: Positive
    """KL weight, in reward units a nat."""

    mass: Mass
    """Probability of the tail."""

    tails: Annotated[tuple[TailKey, ...], Field(min_length=1), NoRepeats] = ("lower", "upper")
    """Which tails are solved, each at this mass."""


class BatchConfig(Section):
    """Offline batches: their sizes, and how many of each."""

    sizes: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=3)]
    """Rewards in a batch, in rising order."""

    rewards: Count
    """Rewards of all batches of one size together, which limits how many there are."""

    fewest: Annotated[int, Field(ge=2)]
    """Batches of each size at least."""

    most: Count
    """Batches of each size at most."""

    fit_from: Count
    """Smallest size that enters the fitted slopes; at least three sizes must be as large."""

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
    """Gradient descent on the right tail's dual."""

    batch: Annotated[int, Field(ge=2)]
    """Rewards in the batch whose dual is descended."""

    updates: Annotated[int, Field(ge=20)]
    """Steps of the descent."""


class ShiftConfig(Section):
    """Batches from a shifted model: the reward is a standard normal coordinate, clipped."""

    clip: Positive
    """Rewards lie in [-clip, clip], since the bound needs them bounded."""

    alpha: Positive
    """KL weight, in reward units a nat."""

    mass: Mass
    """Probability of the tail."""

    deltas: Annotated[list[Positive], Field(min_length=1), NoRepeats]
    """Shifts of the coordinate's mean, in its standard deviations; the KL divergence is half the square."""


class ThresholdStudyConfig(Section):
    """Thresholds against their exact values; see :mod:`flowtilt.pipeline.theory.thresholds`."""

    kind: Literal["threshold"]
    """Which study this is."""

    name: Name
    """Name of the study: that of its file."""

    title: str
    """Title of its table."""

    problems: Annotated[dict[Name, TailConfig], Field(min_length=1), ToldApart]
    """Tail problems on known distributions of rewards, by name."""

    batches: BatchConfig
    """Offline batches from these distributions."""

    descent: DescentConfig
    """Gradient descent on the right tail's dual."""

    shift: ShiftConfig
    """Batches from a model that has moved."""


def _is_positive(matrix: list[list[float]], strictly: bool) -> bool:
    """Whether two rows of two numbers are a symmetric matrix with no negative eigenvalue, or none of 0."""
    (a, b), (c, d) = matrix
    determinant = a * d - b * c
    return b == c and (determinant > 0 < a if strictly else determinant >= 0 <= min(a, d))


class MixtureConfig(Section):
    """A mixture of Gaussians in the plane."""

    weights: Annotated[list[Positive], Field(min_length=1)]
    """Weights of the components; they need not sum to 1."""

    means: Annotated[list[Row], Field(min_length=1)]
    """Means of the components, a pair of coordinates each."""

    covariances: Annotated[list[Matrix], Field(min_length=1)]
    """Covariances of the components, two rows of two numbers each."""

    @model_validator(mode="after")
    def _one_of_each(self) -> MixtureConfig:
        if not len(self.weights) == len(self.means) == len(self.covariances):
            raise ValueError("weights, means and covariances must have one entry per component")
        if not all(_is_positive(each, strictly=True) for each in self.covariances):
            raise ValueError("covariances must be symmetric and positive definite")
        return self


class TiltConfig(Section):
    """A quadratic reward, and the mixtures that it tilts."""

    linear: Row
    """The reward's linear part c, a pair, in reward units a unit of the plane."""

    curvature: Matrix
    """The reward's curvature A, symmetric, two rows of two numbers; the reward is `c^T x - x^T A x / 2`."""

    contexts: Annotated[list[MixtureConfig], Field(min_length=1)]
    """The distribution of each of equally probable contexts, with as many components each; one stands for no
    contexts."""

    @model_validator(mode="after")
    def _has_closed_forms(self) -> TiltConfig:
        if len({len(each.weights) for each in self.contexts}) > 1:
            raise ValueError("contexts must have as many components each")
        if not _is_positive(self.curvature, strictly=False):
            raise ValueError("curvature must be symmetric without negative eigenvalues: no normaliser")
        return self


class AdjointConfig(Section):
    """Adjoint Matching in a study of tilts."""

    updates: Count
    """Optimiser steps."""

    batch: Annotated[int, Field(ge=2)]
    """Trajectories of an update."""

    steps: Annotated[int, Field(ge=2)]
    """Time steps of a trajectory."""

    learning_rate: Positive
    """Of Adam."""


class FittingConfig(Section):
    """Banks and fits in a study of tilts."""

    bank: Annotated[int, Field(ge=100)]
    """Samples of a bank."""

    steps: Count
    """Time steps of the ODE that draws it."""

    updates: Count
    """Optimiser steps of a fit."""

    batch: Count
    """Samples of an update."""

    learning_rate: Positive
    """Of Adam."""


class AnnealingConfig(Section):
    """Stages of annealed fitting in a study of tilts."""

    share: Mass
    """Effective samples that a stage keeps, as a share of its bank."""

    stages: Count
    """Most stages."""


class TiltStudyConfig(Section):
    """Control solvers on tilts in closed form; see :mod:`flowtilt.pipeline.theory.tilts`."""

    kind: Literal["tilts"]
    """Which study this is."""

    name: Name
    """Name of the study: that of its file."""

    title: str
    """Title of its table."""

    nats: Annotated[list[Positive], Field(min_length=1), NoRepeats]
    """What the tilts pay, each of every problem."""

    problems: Annotated[dict[Name, TiltConfig], Field(min_length=1), ToldApart]
    """Tilts by name."""

    adjoint: AdjointConfig
    """Adjoint Matching."""

    fitting: FittingConfig
    """The bank of weighted fitting and of each stage of annealed fitting, and the fit to it."""

    annealing: AnnealingConfig
    """Stages of annealed fitting."""


TheoryConfig = MirrorDescentConfig | ThresholdStudyConfig | TiltStudyConfig
_KINDS: dict[str, type[MirrorDescentConfig] | type[ThresholdStudyConfig] | type[TiltStudyConfig]] = {
    "mirror_descent": MirrorDescentConfig,
    "threshold": ThresholdStudyConfig,
    "tilts": TiltStudyConfig,
}


def load_theory(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TheoryConfig:
    """The study in a file. Raises ConfigError, naming the file, the key and the fix."""
    path = Path(path)
    data = merge(read_yaml(path), overrides or {})
    if data.get("name") != path.stem:
        raise ConfigError(
            f"{path}: key name: must be the file's own, {path.stem!r}, got {data.get('name')!r}"
        )
    if data.get("kind") not in _KINDS:
        raise ConfigError(f"{path}: key kind: must be one of {', '.join(_KINDS)} (got {data.get('kind')!r})")
    return validated(_KINDS[data["kind"]], data, path)
