"""The sections of an experiment's configuration."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, field_validator, model_validator

from flowtilt.configuration import Count, NotNegative, Positive, Row, Section, Share

Weights = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class TailSpec(NamedTuple):
    """The tail problem of one method: what its offline threshold and its single solve are for.

    Attributes:
        side: ``lower`` or ``upper``.
        mass: probability of the tail, in (0, 1).
        alpha: KL weight, in units of the reward a nat.
    """

    side: Literal["lower", "upper"]
    mass: float
    alpha: float


class PathConfig(Section):
    """The interpolant; the rates belong to the variance-preserving one."""

    kind: Literal["linear", "variance_preserving"] = "variance_preserving"
    rate_min: Positive = 0.1
    rate_max: Positive = 12.0


class NetworkConfig(Section):
    """The velocity network."""

    widths: Annotated[list[Count], Field(min_length=1)]
    activation: Literal["relu", "silu"]
    prediction: Literal["velocity", "score"]


class DataConfig(Section):
    """A mixture of axis-aligned Gaussians in the plane that the model is pretrained on.

    ``modes`` makes the model conditional: it gives the mode of each component, from 0. Modes are equally
    likely, and the weights count within each.
    """

    weights: Annotated[list[Positive], Field(min_length=1)]
    means: list[Row]
    deviations: list[Row]
    modes: list[Annotated[int, Field(ge=0)]] | None = None

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
    batch: Count
    learning_rate: Positive


def _landscape(value: str, known: tuple[str, ...]) -> str:
    if value not in known and value.count(":") != 1:
        raise ValueError(f"must be {', '.join(known)} or module:Class")
    return value


class ZonesConfig(Section):
    """A landscape of zones and bumps; see :mod:`flowtilt.domains.planar.landscapes` for the fields.

    ``landscape`` is ``stripes``, ``spikes``, or ``module:Class`` for a subclass of ``Zones`` of
    your own in an importable module.
    """

    landscape: str
    left: float
    plateau: float
    right: float
    bump: float
    left_edge: float
    right_edge: float
    softness: Positive
    width: Positive
    spacing: Positive
    inset: float
    row: float = 0.0
    sign: Literal[-1, 1]

    @field_validator("landscape")
    @classmethod
    def _known_landscape(cls, value: str) -> str:
        return _landscape(value, ("stripes", "spikes"))


class SlopeConfig(Section):
    """A reward that grows along the diagonal and levels off; see ``domains.planar.landscapes.Slope``.

    ``landscape`` is ``slope``, or ``module:Class`` for a subclass of ``Slope`` of your own.
    """

    landscape: str
    height: float
    middle: float
    softness: Positive

    @field_validator("landscape")
    @classmethod
    def _known_landscape(cls, value: str) -> str:
        return _landscape(value, ("slope",))


class BowlConfig(Section):
    """A cost that grows with the squared distance from a centre, and is 1 at the radius."""

    centre: Row
    radius: Positive


class CalibrationConfig(Section):
    """The pretrained row that the landscape's right edge is fitted to."""

    target: float
    bracket: Row


class TailObjective(Section):
    """The KL-regularised tail problem.

    ``alpha`` is the KL weight of a sample's reward, in reward units a nat. The tail problems
    divide it by the mass of the tail, since their first variation is a reward divided by it: all
    methods then tilt a sample that counts by the same exponent a unit of reward.
    """

    tail: Literal["lower", "upper"]
    level: Annotated[float, Field(gt=0, lt=1)]
    alpha: Positive

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

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FunctionalObjective(Section):
    """``utility - alpha divergence``; alpha in units of the utility a unit of the divergence."""

    utility: TermConfig
    divergence: TermConfig
    alpha: NotNegative


class OfflineConfig(Section):
    """Samples of the offline batch, and of the batch that FDC linearises at."""

    samples: Count


class SolverConfig(Section):
    """The control solver of all methods, of which a method may change keys for itself.

    One key, ``kind``, chooses it; ``pool``, ``ramp``, ``endpoint_gradient``, ``last_share`` and
    ``rest_share`` belong to :class:`flowtilt.control.adjoint_matching.AdjointMatchingSettings`, ``bank``,
    ``bank_steps`` and ``penalty`` to :class:`flowtilt.control.weighted_fitting.WeightedFittingSettings`,
    the rest to both.
    """

    kind: Literal["adjoint_matching", "weighted_fitting"] = "adjoint_matching"
    updates: Count
    batch: Annotated[int, Field(ge=2)]
    pool: Count
    steps: Annotated[int, Field(ge=2)]
    learning_rate: Positive
    warmup: Share
    ramp: Share
    gradient_clip: Positive
    control_clip: Positive | None = None
    endpoint_gradient: Literal["pathwise", "likelihood_ratio"] = "pathwise"
    last_share: Share
    rest_share: Share
    bank: Count = 20000
    bank_steps: Count = 16
    penalty: Literal["kl", "pearson", "cressie_read_3", "reverse_kl", "squared_hellinger"] = "kl"

    @model_validator(mode="after")
    def _pool_holds_batch(self) -> SolverConfig:
        if self.kind == "adjoint_matching" and self.pool < self.batch:
            raise ValueError(f"pool ({self.pool}) must be at least batch ({self.batch})")
        return self


class MethodConfig(Section):
    """One method of an experiment.

    ``continue_from`` names an fdc method with fewer iterations to start from. ``updates`` is a
    smaller number of updates than the solver's for each of the method's solves. ``solver`` changes
    keys of the experiment's solver for this method alone.
    """

    step_key: ClassVar[str]

    kind: Literal["pretrained", "am", "fdc", "tfft"]
    iterations: Count | None = None
    continue_from: str | None = None
    updates: Count | None = None
    solver: dict[str, Any] = Field(default_factory=dict)

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


class TailMethodConfig(MethodConfig):
    """A method on a tail; ``step`` is alpha over the KL weight of FDC's steps, 1 the largest in theory."""

    step_key = "step"

    step: Annotated[float, Field(gt=0, le=1)] | None = None


class FunctionalMethodConfig(MethodConfig):
    """A method on a functional.

    ``step_weight`` is the KL weight of FDC's steps (the paper's eta), in units of the objective a
    nat. ``objective`` changes keys of the experiment's for this method alone.
    """

    step_key = "step_weight"

    step_weight: Positive | None = None
    objective: dict[str, Any] = Field(default_factory=dict)


class EvaluationConfig(Section):
    """Samples of each run, and how many of them get a log-density."""

    samples: Count
    density_samples: Count
    ode_steps: Count


class TransportConfig(Section):
    """Distances from the pretrained model: mean shifts along the axes, and W1 in each ground metric.

    ``metrics`` names the ground metrics and gives the weights of the two axes in
    ``d(x, y)^2 = sum_i w_i (x_i - y_i)^2``; ``samples`` enter the exact distance.
    """

    metrics: Annotated[dict[str, Weights], Field(min_length=1)]
    samples: Count


class EntropyConfig(Section):
    """Entropy by log-densities, and by a histogram of ``bins`` a side on ``[-extent, extent]^2``."""

    extent: Positive
    bins: Count


class FunctionalEvaluationConfig(EvaluationConfig):
    """The same, and which families of metrics are computed beside the objective."""

    transport: TransportConfig | None = None
    entropy: EntropyConfig | None = None


class GridConfig(Section):
    """The fine grid of the exact rows, and the coarse one where the model's density is computed."""

    extent: Positive
    cells: Annotated[int, Field(ge=16)]
    density_cells: Annotated[int, Field(ge=8)]
