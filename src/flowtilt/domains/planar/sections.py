"""Sections of experiments in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from flowtilt.pipeline.configuration import Count, Name, NotNegative, Positive, Row, Section, ToldApart
from flowtilt.pipeline.sections import LEVEL, SearchedMethodConfig, TailKey

Weights = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class PathConfig(Section):
    """The interpolant; the rates belong to the variance-preserving one."""

    kind: Literal["linear", "variance_preserving"] = "variance_preserving"
    """``linear`` is the straight path of flow matching, ``variance_preserving`` that of the
    variance-preserving diffusion."""

    rate_min: Positive = 0.1
    """Noise rate at the data end of the variance-preserving path, per unit of time."""

    rate_max: Positive = 12.0
    """Noise rate at its noise end, per unit of time, not below ``rate_min``; the rate is linear in
    between."""


class NetworkConfig(Section):
    """The velocity network."""

    widths: Annotated[list[Count], Field(min_length=1)]
    """Widths of the hidden layers of the multilayer perceptron, from the input on."""

    activation: Literal["relu", "silu"]
    """Activation after each hidden layer."""

    prediction: Literal["velocity", "score"]
    """What the network's output stands for; a ``score`` needs the variance-preserving path."""


class PretrainConfig(Section):
    """Flow-matching pretraining."""

    updates: Count
    """Optimiser steps."""

    batch: Count
    """Samples an update."""

    learning_rate: Positive
    """Learning rate of Adam at the start; a cosine takes it to zero."""


def _landscape(value: str, known: tuple[str, ...]) -> str:
    if value not in known and value.count(":") != 1:
        raise ValueError(f"must be {', '.join(known)} or module:Class")
    return value


class ZonesConfig(Section):
    """A landscape of three zones along x, with bumps in the right one.

    Its formula is in :mod:`flowtilt.domains.planar.landscapes`. The plane's axes have no units.
    """

    landscape: str
    """``stripes``, whose bumps run all along y, ``spikes``, whose bumps stand on a square lattice, or
    ``module:Class`` for a subclass of ``Zones`` of your own in an importable module."""

    left: float
    """Height of the left zone."""

    plateau: float
    """Height of the plateau between the zones."""

    right: float
    """Height of the right zone."""

    bump: float
    """Height of the bumps' crests."""

    left_edge: float
    """Where along x the left zone gives way to the plateau."""

    right_edge: float
    """Where along x the plateau gives way to the right zone; the module
    ``flowtilt.domains.planar.calibration`` finds it."""

    softness: Positive
    """Half-width of both transitions."""

    width: Positive
    """Half-width of a bump."""

    spacing: Positive
    """Distance between neighbouring bumps."""

    inset: float
    """Distance of the first column of bumps from the right edge."""

    row: float = 0.0
    """Where along y a row of bumps stands; for ``spikes``."""

    sign: Literal[-1, 1]
    """1 if heights are rewards, -1 if they are costs and the reward is minus the height."""

    @field_validator("landscape")
    @classmethod
    def _known_landscape(cls, value: str) -> str:
        return _landscape(value, ("stripes", "spikes"))


class SlopeConfig(Section):
    """A smooth reward; which further keys it has depends on the landscape.

    Formulas are in :mod:`flowtilt.domains.planar.landscapes`. One of your own takes those that are given.
    """

    landscape: str
    """``slope``, which grows along the diagonal and levels off, ``rings``, 1 less the squared distance to the
    nearest ring, ``cone``, which grows with the distance to a centre without end, or ``module:Class`` for a
    ``Reward`` of your own in an importable module."""

    height: float | None = None
    """Reward where a ``slope`` has levelled off, or at the distance 1 from the centre of a ``cone``; both
    start from 0."""

    middle: float | None = None
    """Where along the diagonal, (x + y) / sqrt(2), half of it is reached; for ``slope``."""

    softness: Positive | None = None
    """Half-width of the step along the diagonal; for ``slope``."""

    centre: Row | None = None
    """Where the reward is 0, a pair of coordinates; for ``cone``."""

    centres: Annotated[list[Row], Field(min_length=1)] | None = None
    """Centres of the rings, a pair of coordinates each; for ``rings``."""

    radius: Positive | None = None
    """Radius of every ring; for ``rings``."""

    @field_validator("landscape")
    @classmethod
    def _known_landscape(cls, value: str) -> str:
        return _landscape(value, tuple(_OF_LANDSCAPE))

    @model_validator(mode="after")
    def _keys_of_landscape(self) -> SlopeConfig:
        if (wanted := _OF_LANDSCAPE.get(self.landscape)) is None:
            return self
        given = {key for key in type(self).model_fields if getattr(self, key) is not None} - {"landscape"}
        if missing := wanted - given:
            raise ValueError(f"{self.landscape} needs {' and '.join(sorted(missing))}; add it")
        if extra := given - wanted:
            raise ValueError(f"{self.landscape} has no {' or '.join(sorted(extra))}; remove it")
        return self


_OF_LANDSCAPE = {
    "slope": {"height", "middle", "softness"},
    "rings": {"centres", "radius"},
    "cone": {"height", "centre"},
}


class BowlConfig(Section):
    """A cost that grows with the squared distance from a centre, and is 1 at the radius."""

    centre: Row
    """Where the cost is 0."""

    radius: Positive
    """Distance from the centre at which the cost is 1."""


class CalibrationConfig(Section):
    """The pretrained row that the landscape\'s right edge is fitted to, by the module
    ``flowtilt.domains.planar.calibration`` alone."""

    target: float
    """Tail mean of the pretrained row that the papers report, in units of the landscape's height."""

    bracket: Row
    """Two right edges, between which the calibrated one is looked for."""


class TailObjective(Section):
    """The KL-regularised tail problem.

    The first variation of a tail's mean is a reward divided by the tail's probability. With ``alpha``
    divided by it too, all methods tilt a sample that counts by the same exponent a unit of reward.
    """

    renamed: ClassVar[Mapping[str, str]] = {"level": LEVEL}

    tail: TailKey
    """Which tail of the reward is raised: ``lower`` or ``left``, its worst values, or ``upper`` or ``right``,
    its best."""

    mass: Annotated[float, Field(gt=0, lt=1)]
    """Share of probability in the tail. The papers' quantile level b is the mass of the lower tail, and one
    minus that of the upper."""

    alpha: Positive
    """KL weight of a sample's reward, in reward units a nat; the tail problems divide it by the
    probability of the tail."""

    @property
    def tail_alpha(self) -> float:
        """KL weight of the tail problem."""
        return self.alpha / self.mass


class TermConfig(Section):
    """A utility or a divergence: its name in the registry, or ``module:NAME``, and its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    renamed: ClassVar[Mapping[str, str]] = {"level": LEVEL}

    kind: str
    """Name in the tables of functionals below, ``module:NAME`` for an entry of your own in an importable
    module, or ``sum``. The functional's parameters stand beside it."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FunctionalObjective(Section):
    """What is maximised: ``utility - alpha divergence``."""

    utility: TermConfig
    """What is raised."""

    divergence: TermConfig
    """What is paid for leaving the pretrained distribution."""

    alpha: NotNegative
    """Weight of the divergence, in units of the utility a unit of the divergence."""


class PlanarMethodConfig(SearchedMethodConfig):
    """One method of an experiment in the plane."""

    step_key: ClassVar[str]

    kind: Literal["pretrained", "am", "fdc", "tfft", "best_of", "resampled", "steered"]
    """``pretrained`` is not fine-tuned; ``am`` is Adjoint Matching on the expected reward; ``fdc`` is Flow
    Density Control; ``tfft`` is Tail-aware Flow Fine-Tuning. The others train nothing, and keep samples of
    the pretrained model: ``best_of`` the best of every ``n``, ``resampled`` those of the offline batch,
    ``steered`` particles of sequential Monte Carlo."""

    iterations: Count | None = None
    """Linearisations, each with a solve; for ``fdc``, which must have it."""

    continue_from: str | None = None
    """Name of an ``fdc`` method with fewer iterations and the same other keys, whose model this one starts
    from."""

    updates: Count | None = None
    """Optimiser steps of each of the method's solves, if fewer than the solver's."""

    solver: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``solver`` that are changed for this method alone."""

    @model_validator(mode="after")
    def _fields_of_kind(self) -> PlanarMethodConfig:
        own = ("iterations", self.step_key, "by", "continue_from")
        given = {key for key in own if getattr(self, key) is not None}
        if self.kind == "fdc":
            if missing := {"iterations"} - given:
                raise ValueError(f"an fdc method needs {' and '.join(sorted(missing))}")
            if self.fixed_step is None and self.by != "exponents":
                raise ValueError(
                    f"an fdc method needs {self.step_key}, or by: exponents, which searches the steps"
                )
        elif given:
            raise ValueError(f"{', '.join(sorted(given))} belong to fdc, not to {self.kind}")
        if not self.tuned and self.solver:
            raise ValueError(f"solver belongs to methods that are fine-tuned, not to {self.kind}; remove it")
        return self

    @property
    def fixed_step(self) -> float | None:
        """The step as configured; None where each is searched."""
        step: float | None = getattr(self, self.step_key)
        return step

    def continues(self, earlier: PlanarMethodConfig) -> bool:
        """Whether this is ``earlier`` with more iterations."""
        own, its = (m.model_dump(exclude={"iterations", "continue_from"}) for m in (self, earlier))
        return own == its and (earlier.iterations or 0) < (self.iterations or 0)


class TailMethodConfig(PlanarMethodConfig):
    """A method on a tail."""

    step_key = "step"

    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """KL weight of the tail problem over that of each step, 1 being the largest step in theory; for ``fdc``,
    which must have it where it goes by scores."""


class FunctionalMethodConfig(PlanarMethodConfig):
    """A method on a functional."""

    step_key = "step_weight"

    kind: Literal["pretrained", "am", "fdc", "tfft"]
    """``pretrained`` is not fine-tuned; ``am`` is Adjoint Matching on the expected reward; ``fdc`` is Flow
    Density Control; ``tfft`` is Tail-aware Flow Fine-Tuning. Methods that train nothing belong to experiments
    on a tail: here runs are measured by the density of their own network."""

    step_weight: Positive | None = None
    """KL weight of each step (the paper's eta), in units of the objective a nat; for ``fdc``, which must have
    it where it goes by scores."""

    objective: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``objective`` that are changed for this method alone."""


class EvaluationConfig(Section):
    """How each run is measured."""

    samples: Count
    """Samples of each run, drawn by the probability-flow ODE."""

    density_samples: Count
    """How many of them get a log-density, which their KL divergence is estimated from."""

    ode_steps: Count
    """Time steps of the ODE solver of order 4, for samples, log-densities and likelihoods."""


class TransportConfig(Section):
    """Distances from the pretrained model: mean shifts along the axes, and W1 in each ground metric."""

    metrics: Annotated[dict[Name, Weights], Field(min_length=1), ToldApart]
    """Ground metrics by name: the weights w of the two axes in d(x, y)^2 = sum_i w_i (x_i - y_i)^2."""

    samples: Count
    """Samples of either distribution in the exact optimal transport, and of those that critics see."""

    critic_updates: Count = 1000
    """Updates of the critic that estimates W1 from below, one for each ground metric."""


class EntropyConfig(Section):
    """Entropy by log-densities, and by a histogram."""

    extent: Positive
    """Half the side of the square around the origin that the histogram covers."""

    bins: Count
    """Cells of the histogram along a side."""

    samples: Count
    """Samples in the histogram, of those that a run is measured by: with fewer than cells, its entropy hangs
    on their number."""


class SlicedConfig(Section):
    """The sliced Wasserstein distance of order 2 from the optimum on the grid."""

    directions: Annotated[int, Field(ge=2)]
    """Directions of the slices, evenly over the half circle."""


class FunctionalEvaluationConfig(EvaluationConfig):
    """How each run is measured, and which families of metrics are computed beside the objective."""

    transport: TransportConfig | None = None
    """Metrics of the distance from the pretrained model; none without it."""

    entropy: EntropyConfig | None = None
    """Metrics of entropy and coverage; none without it."""

    sliced: SlicedConfig | None = None
    """Distances from the optimum of the experiment's objective, and of a method's own where it has another;
    none without it."""


class GridConfig(Section):
    """The fine grid of the exact rows, and the coarse one of a model's density, interpolated by a spline."""

    extent: Positive
    """Half the side of both grids, which are squares around the origin."""

    cells: Annotated[int, Field(ge=16)]
    """Cells along a side of the grid that methods are solved on exactly."""

    density_cells: Annotated[int, Field(ge=8)]
    """Points along a side of the coarse grid where a model's log-density is computed."""
