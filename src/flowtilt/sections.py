"""The sections of an experiment's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from flowtilt.configuration import Count, Name, NotNegative, Positive, Row, Section, Share, ToldApart
from flowtilt.words import Side, tail_side

Weights = Annotated[list[Positive], Field(min_length=2, max_length=2)]
Tail = Annotated[Side, BeforeValidator(tail_side)]


class TailSpec(NamedTuple):
    """The tail problem of one method: what its offline threshold and its single solve are for.

    Attributes:
        side: ``lower`` or ``upper``.
        mass: probability of the tail, in (0, 1).
        alpha: KL weight, in units of the reward a nat.
    """

    side: Side
    mass: float
    alpha: float


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


class DataConfig(Section):
    """A mixture of axis-aligned Gaussians in the plane that the model is pretrained on."""

    weights: Annotated[list[Positive], Field(min_length=1)]
    """Weights of the components; they need not sum to 1."""

    means: list[Row]
    """Means of the components, a pair of coordinates each."""

    deviations: list[Row]
    """Standard deviations of the components along x and y, positive."""

    modes: list[Annotated[int, Field(ge=0)]] | None = None
    """Mode of each component, from 0, for a model that is conditional on the mode; modes are equally
    likely, and the weights count within each. For experiments on functionals."""

    @model_validator(mode="after")
    def _one_of_each(self) -> DataConfig:
        if not len(self.weights) == len(self.means) == len(self.deviations):
            raise ValueError("weights, means and deviations must have one entry per component")
        if any(d <= 0 for row in self.deviations for d in row):
            raise ValueError("deviations must be positive")
        if self.modes is not None and (
            len(self.modes) != len(self.weights) or set(self.modes) != set(range(self.mode_count))
        ):
            raise ValueError("modes must have one entry per component, and leave out no number from 0")
        return self

    @property
    def mode_count(self) -> int:
        """How many modes the model is conditional on; 0 without."""
        return 0 if self.modes is None else max(self.modes, default=-1) + 1


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
    """Where along x the plateau gives way to the right zone; ``flowtilt calibrate`` finds it."""

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
    """A reward that grows along the diagonal and levels off.

    Its formula is in :class:`flowtilt.domains.planar.landscapes.Slope`.
    """

    landscape: str
    """``slope``, or ``module:Class`` for a subclass of ``Slope`` of your own in an importable module."""

    height: float
    """Reward where it has levelled off; it starts from 0."""

    middle: float
    """Where along the diagonal, (x + y) / sqrt(2), half of it is reached."""

    softness: Positive
    """Half-width of the step along the diagonal."""

    @field_validator("landscape")
    @classmethod
    def _known_landscape(cls, value: str) -> str:
        return _landscape(value, ("slope",))


class BowlConfig(Section):
    """A cost that grows with the squared distance from a centre, and is 1 at the radius."""

    centre: Row
    """Where the cost is 0."""

    radius: Positive
    """Distance from the centre at which the cost is 1."""


class CalibrationConfig(Section):
    """The pretrained row that the landscape's right edge is fitted to, by ``flowtilt calibrate`` alone."""

    target: float
    """Tail mean of the pretrained row that the papers report, in units of the landscape's height."""

    bracket: Row
    """Two right edges, between which the calibrated one is looked for."""


class TailObjective(Section):
    """The KL-regularised tail problem.

    The first variation of a tail's mean is a reward divided by the tail's probability. With ``alpha``
    divided by it too, all methods tilt a sample that counts by the same exponent a unit of reward.
    """

    tail: Tail
    """Which tail of the reward is raised: ``lower`` or ``left``, its worst values, or ``upper`` or ``right``,
    its best."""

    level: Annotated[float, Field(gt=0, lt=1)]
    """Quantile level b: the lower tail has the probability b, the upper one 1 - b."""

    alpha: Positive
    """KL weight of a sample's reward, in reward units a nat; the tail problems divide it by the
    probability of the tail."""

    @property
    def mass(self) -> float:
        """Probability of the tail."""
        return self.level if self.tail == "lower" else 1 - self.level

    @property
    def tail_alpha(self) -> float:
        """KL weight of the tail problem."""
        return self.alpha / self.mass


class TermConfig(Section):
    """A utility or a divergence: its name in the registry, or ``module:NAME``, and its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

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
    """What is paid for leaving the pretrained law."""

    alpha: NotNegative
    """Weight of the divergence, in units of the utility a unit of the divergence."""


class OfflineConfig(Section):
    """Size of the batches that thresholds and linearisations come from."""

    samples: Count
    """Samples of the pretrained model for TFFT's threshold, of the current one for each of FDC's
    linearisations, and of both for divergences that compare samples."""


class SolverConfig(Section):
    """The control solver of all methods, of which a method may change keys for itself.

    The modules :mod:`flowtilt.control.adjoint_matching` and :mod:`flowtilt.control.weighted_fitting` say how
    either works. Keys that belong to one of them say so.
    """

    kind: Literal["adjoint_matching", "weighted_fitting"] = "adjoint_matching"
    """``adjoint_matching`` follows the reward's gradient along trajectories; ``weighted_fitting`` takes
    its values alone."""

    updates: Count
    """Optimiser steps of each solve."""

    batch: Annotated[int, Field(ge=2)]
    """Trajectories, or for weighted fitting samples of the bank, that enter an update."""

    pool: Count
    """Trajectories drawn for each update of a tilt that is zero for most of them, at least ``batch``; the
    pool is thinned to the batch by strata. Adjoint Matching."""

    steps: Annotated[int, Field(ge=2)]
    """Time steps of the memoryless process, also of that which draws the offline batch."""

    learning_rate: Positive
    """Largest learning rate of Adam; a cosine takes it to zero."""

    warmup: Share
    """Share of the updates over which the learning rate rises linearly."""

    ramp: Share
    """Share of the updates over which the tilt grows linearly to its full strength. Adjoint Matching."""

    gradient_clip: Positive
    """Bound on the norm of the parameters' gradient."""

    control_clip: Positive | None = None
    """Bound c on the norm of the control that a sample asks for at a step: all the way, it spends c^2 / 2
    nats. Without it controls are not clipped. Adjoint Matching."""

    endpoint_gradient: Literal["pathwise", "likelihood_ratio"] = "pathwise"
    """How the tilt's gradient at the end of a trajectory is estimated: ``pathwise``, by its own gradient,
    or by ``likelihood_ratio``, from its values, which has less noise where the tilt has edges. Adjoint
    Matching."""

    adjoint: Literal["lean", "posterior_mean"] = "lean"
    """How that gradient is carried to earlier times: ``lean``, along the trajectory, or by
    ``posterior_mean``, the Jacobian of the mean of the endpoint, which has no noise of the trajectory and is
    exact to first order in a tilt that is linear; see
    :func:`flowtilt.control.adjoint_matching.posterior_mean_adjoint`. Adjoint Matching."""

    target: Literal["state", "step"] = "state"
    """What the velocity at a state is regressed on: ``state``, the adjoint of that state, or ``step``, the
    move of the discrete step, with the adjoint of the state after it and several times the bias; see
    :mod:`flowtilt.control.discretisation`. Adjoint Matching."""

    last_share: Share
    """Share of the time steps, nearest to the data, that are always in the loss. Adjoint Matching."""

    rest_share: Share
    """Share of the other time steps that is drawn at random for each update. Adjoint Matching."""

    passes: Count = 1
    """Updates on the same trajectories, each with time steps of its own. Adjoint Matching."""

    micro_batch: Count | None = None
    """Most trajectories whose regression is in memory at once, all others waiting; without it all are.
    Adjoint Matching."""

    bank: Count = 20000
    """Samples of the base model that are weighted. Weighted fitting."""

    bank_steps: Count = 16
    """Time steps of the ODE solver of order 4 that draws the bank. Weighted fitting."""

    penalty: Literal["kl", "pearson", "cressie_read_3", "reverse_kl", "squared_hellinger"] = "kl"
    """Divergence from the base that the weights pay for. Weighted fitting."""

    @model_validator(mode="after")
    def _keys_fit(self) -> SolverConfig:
        if self.kind == "adjoint_matching" and self.pool < self.batch:
            raise ValueError(f"pool ({self.pool}) must be at least batch ({self.batch})")
        if self.adjoint == "posterior_mean" and self.endpoint_gradient != "pathwise":
            raise ValueError(
                "endpoint_gradient must be pathwise where adjoint is posterior_mean, which takes the "
                "gradient at the end of a trajectory"
            )
        return self


class MethodConfig(Section):
    """One method of an experiment."""

    step_key: ClassVar[str]

    kind: Literal["pretrained", "am", "fdc", "tfft"]
    """``pretrained`` is not fine-tuned; ``am`` is Adjoint Matching on the expected reward; ``fdc`` is Flow
    Density Control; ``tfft`` is Tail-aware Flow Fine-Tuning."""

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
    def _fields_of_kind(self) -> MethodConfig:
        own = ("iterations", self.step_key, "continue_from")
        given = {key for key in own if getattr(self, key) is not None}
        if self.kind == "fdc":
            if missing := {"iterations", self.step_key} - given:
                raise ValueError(f"an fdc method needs {' and '.join(sorted(missing))}")
        elif given:
            raise ValueError(f"{', '.join(sorted(given))} belong to fdc, not to {self.kind}")
        if self.kind == "pretrained" and self.solver:
            raise ValueError("solver belongs to methods that are fine-tuned, not to pretrained; remove it")
        return self

    def continues(self, earlier: MethodConfig) -> bool:
        """Whether this is ``earlier`` with more iterations."""
        own, its = (m.model_dump(exclude={"iterations", "continue_from"}) for m in (self, earlier))
        return own == its and (earlier.iterations or 0) < (self.iterations or 0)


class OfKind(Protocol):
    """What methods of all domains have."""

    @property
    def kind(self) -> str: ...


def check_methods(methods: Mapping[str, OfKind], layers: Sequence[str]) -> None:
    """Refuse methods whose names stand for something else in the results' files and rows.

    Args:
        methods: by name.
        layers: rows of each method in the tables: its network's, and those that are solved on the grid.

    Raises:
        ValueError: naming the method and the fix.
    """
    for name, method in methods.items():
        if name in layers:
            raise ValueError(f"methods.{name}: the name is taken by the rows solved on the grid; rename it")
        if name == "pretrained" and method.kind != "pretrained":
            raise ValueError(
                f"methods.{name}: the name is that of the pretrained model, not of one of kind "
                f"{method.kind}; rename it"
            )
        if name != "pretrained" and method.kind == "pretrained":
            raise ValueError(
                f"methods.{name}: the pretrained model goes by the name pretrained; write "
                "pretrained: {kind: pretrained}, once"
            )
        of, _, layer = name.rpartition("_")
        if of in methods and layer in layers:
            raise ValueError(f"methods.{name}: the name is taken by a row of the method {of}; rename it")


class TailMethodConfig(MethodConfig):
    """A method on a tail."""

    step_key = "step"

    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """KL weight of the tail problem over that of a step, 1 being the largest step in theory; for ``fdc``,
    which must have it."""


class FunctionalMethodConfig(MethodConfig):
    """A method on a functional."""

    step_key = "step_weight"

    step_weight: Positive | None = None
    """KL weight of a step (the paper's eta), in units of the objective a nat; for ``fdc``, which must have
    it."""

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
    """Samples of either law in the exact optimal transport."""


class EntropyConfig(Section):
    """Entropy by log-densities, and by a histogram."""

    extent: Positive
    """Half the side of the square around the origin that the histogram covers."""

    bins: Count
    """Cells of the histogram along a side."""


class FunctionalEvaluationConfig(EvaluationConfig):
    """How each run is measured, and which families of metrics are computed beside the objective."""

    transport: TransportConfig | None = None
    """Metrics of the distance from the pretrained model; none without it."""

    entropy: EntropyConfig | None = None
    """Metrics of entropy and coverage; none without it."""


class GridConfig(Section):
    """The fine grid of the exact rows, and the coarse one of a model's density, interpolated by a spline."""

    extent: Positive
    """Half the side of both grids, which are squares around the origin."""

    cells: Annotated[int, Field(ge=16)]
    """Cells along a side of the grid that methods are solved on exactly."""

    density_cells: Annotated[int, Field(ge=8)]
    """Points along a side of the coarse grid where a model's log-density is computed."""
