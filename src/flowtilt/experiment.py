"""One validated configuration per experiment.

An experiment is one YAML file; a study is a file whose ``study`` block lists cases, each an
experiment derived from another file and complete in itself. Scales (smoke, paper) are overrides
that are merged in last. This module imports neither torch nor the numerics: a workflow reads it.

There are two kinds of experiments, told apart by their ``objective``: those on a tail of a reward,
and those on any pair of a utility and a divergence (``objective.utility``).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)
Row = Annotated[list[float], Field(min_length=2, max_length=2)]
Weights = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the fix."""


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


class Section(BaseModel):
    """A mapping of a configuration: keys that it does not know are refused, and it cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """A mixture of axis-aligned Gaussians in the plane that the model is pretrained on."""

    weights: Annotated[list[Positive], Field(min_length=1)]
    means: list[Row]
    deviations: list[Row]

    @model_validator(mode="after")
    def _one_of_each(self) -> DataConfig:
        if not len(self.weights) == len(self.means) == len(self.deviations):
            raise ValueError("weights, means and deviations must have one entry per component")
        if any(d <= 0 for row in self.deviations for d in row):
            raise ValueError("deviations must be positive")
        return self


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

    One key, ``kind``, chooses it; ``pool``, ``ramp``, ``last_share`` and ``rest_share`` belong to
    :class:`flowtilt.control.adjoint_matching.AdjointMatchingSettings`, ``bank`` and ``penalty`` to
    :class:`flowtilt.control.weighted_fitting.WeightedFittingSettings`, the rest to both.
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
    endpoint_gradient: Literal["pathwise", "likelihood_ratio"] = "pathwise"
    last_share: Share
    rest_share: Share
    bank: Count = 20000
    penalty: Literal["kl", "pearson", "cressie_read_3", "reverse_kl", "squared_hellinger"] = "kl"

    @model_validator(mode="after")
    def _pool_holds_batch(self) -> SolverConfig:
        if self.pool < self.batch:
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
    solver: dict[str, Any] = {}

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
    objective: dict[str, Any] = {}


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


class Experiment(Section, ABC):
    """What every experiment, or one case of a study, has; see the two kinds below."""

    layers: ClassVar[tuple[str, ...]]
    """Rows of each method in the tables: its network's, and those that are solved on the grid."""

    solved_apart: ClassVar[bool] = True
    """Whether rows solved on the grid are made for all methods together, in a folder for each layer."""

    reads_too: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Sections that a stage reads in experiments of this kind only."""

    name: str
    title: str
    base: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    path: PathConfig
    network: NetworkConfig
    data: DataConfig
    pretrain: PretrainConfig
    offline: OfflineConfig
    solver: SolverConfig
    methods: Annotated[Mapping[str, MethodConfig], Field(min_length=1)]
    evaluation: EvaluationConfig
    grid: GridConfig
    axis_value: float | None = None

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_of_seeds(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _prediction_fits_path(self) -> Experiment:
        if self.path.kind == "linear" and self.network.prediction == "score":
            raise ValueError(
                "network.prediction: a score gives no finite velocity at the noise end of the linear path; "
                "set it to velocity"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> Experiment:
        for name, method in self.methods.items():
            if name in self.layers:
                raise ValueError(
                    f"methods.{name}: the name is taken by the rows solved on the grid; rename it"
                )
            self._solver(name)
            if method.continue_from is None:
                continue
            earlier = self.methods.get(method.continue_from)
            if earlier is None or earlier.kind != "fdc":
                raise ValueError(
                    f"methods.{name}.continue_from names {method.continue_from!r}, "
                    f"which is no fdc method of this experiment ({', '.join(self.methods)})"
                )
            if not method.continues(earlier):
                raise ValueError(
                    f"methods.{name} must have more iterations than {method.continue_from!r}, "
                    "and all other keys the same"
                )
        return self

    def _solver(self, method: str) -> SolverConfig:
        return _changed(self.solver, self.methods[method].solver, f"methods.{method}.solver")

    def solver_of(self, method: str) -> SolverConfig:
        """The control solver of a method: the experiment's with the method's changes.

        How many updates each solve has is what :meth:`updates_of` says.
        """
        method_of(self, method)
        return self._solver(method)

    def updates_of(self, method: str) -> int:
        """Optimiser steps in each solve of a method."""
        most = self.solver_of(method).updates
        return min(method_of(self, method).updates or most, most)

    @abstractmethod
    def _tail(self, method: str) -> TailSpec | None:
        """The tail problem that a method's objective is, if it is one."""

    def tail_of(self, method: str) -> TailSpec:
        """Side, mass and KL weight of a method's tail problem.

        Raises:
            ConfigError: if what the method maximises is no tail mean under KL.
        """
        method_of(self, method)
        tail = self._tail(method)
        if tail is None:
            raise ConfigError(f"experiment {self.name}: key methods.{method}: {_NO_TAIL}")
        return tail

    @property
    def main_metric(self) -> str:
        """The metric that the tables lead with."""
        return "functional"

    @property
    def mass(self) -> float:
        """Share of the law that the methods look at."""
        return 1.0

    @property
    def mean_metric(self) -> str:
        return f"mean_{self.unit}"

    @property
    def unit(self) -> str:
        """What the landscape's height is: ``cost`` or ``reward``."""
        return "reward"


class TailExperiment(Experiment):
    """An experiment on a tail of a landscape's cost or reward."""

    layers = ("network", "exact", "resolved")

    reward: ZonesConfig
    calibration: CalibrationConfig
    objective: TailObjective
    methods: Annotated[Mapping[str, TailMethodConfig], Field(min_length=1)]

    def _tail(self, method: str) -> TailSpec:
        return TailSpec(self.objective.tail, self.objective.mass, self.objective.tail_alpha)

    @property
    def tail_metric(self) -> str:
        """Name of the tail metric, as in the papers' tables: ``worst_1pct_cost``, ``top_1pct_reward``."""
        which = "worst" if self.objective.tail == "lower" else "top"
        percent = f"{100 * self.objective.mass:.6g}"
        return f"{which}_{percent}pct_{self.unit}"

    @property
    def main_metric(self) -> str:
        return self.tail_metric

    @property
    def mass(self) -> float:
        return self.objective.mass

    @property
    def unit(self) -> str:
        return "cost" if self.reward.sign < 0 else "reward"


class FunctionalExperiment(Experiment):
    """An experiment on any utility and divergence of the registry, with or without a reward."""

    layers = ("network", "exact", "optimum")
    solved_apart = False
    reads_too: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "finetune": ("cost", "evaluation"),
        "evaluate": ("path", "network", "data", "cost", "evaluation", "solver", "offline"),
    }

    reward: SlopeConfig | None = None
    cost: BowlConfig | None = None
    objective: FunctionalObjective
    methods: Annotated[Mapping[str, FunctionalMethodConfig], Field(min_length=1)]
    evaluation: FunctionalEvaluationConfig

    @model_validator(mode="after")
    def _problems_fit(self) -> FunctionalExperiment:
        for name, method in self.methods.items():
            problem = self._problem(name)
            kinds = (problem.utility.kind, problem.divergence.kind)
            if method.kind == "am" and (kinds != ("expected_reward", "kl") or problem.alpha == 0):
                raise ValueError(
                    f"methods.{name}: am raises the expected reward under a KL weight alpha > 0; give it "
                    "objective: {utility: {kind: expected_reward}, divergence: {kind: kl}, alpha: ...}"
                )
            if method.kind == "tfft" and self._tail(name) is None:
                raise ValueError(f"methods.{name}: {_NO_TAIL}")
        pretrained = [name for name, method in self.methods.items() if method.kind == "pretrained"]
        if self.evaluation.transport is not None and pretrained != ["pretrained"]:
            raise ValueError(
                "evaluation.transport: distances are from the samples of the method 'pretrained'; "
                "add methods.pretrained: {kind: pretrained}"
            )
        return self

    def _problem(self, method: str) -> FunctionalObjective:
        return _changed(self.objective, self.methods[method].objective, f"methods.{method}.objective")

    def _tail(self, method: str) -> TailSpec | None:
        problem = self._problem(method)
        side, level = _TAILS.get(problem.utility.kind), problem.utility.parameters.get("level")
        if side is None or self.reward is None or problem.divergence.kind != "kl" or problem.alpha == 0:
            return None
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level < 1:
            return None
        return TailSpec(side, level if side == "lower" else 1 - level, problem.alpha)

    def problem_of(self, method: str) -> FunctionalObjective:
        """What a method maximises: the experiment's objective with the method's changes."""
        method_of(self, method)
        return self._problem(method)


_TAILS: Mapping[str, Literal["lower", "upper"]] = {"cvar": "lower", "sq": "upper"}
_NO_TAIL = (
    "tfft raises a tail mean of a reward under a KL weight alpha > 0; give the experiment a reward, and the "
    "method objective: {utility: {kind: cvar or sq, level: between 0 and 1}, divergence: {kind: kl}, "
    "alpha: ...}"
)


_STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "pretrain": ("base", "path", "network", "data", "pretrain"),
    "density": ("path", "network", "grid", "evaluation"),
    "offline": ("name", "path", "network", "reward", "offline", "solver"),
    "threshold": ("objective",),
    "finetune": ("name", "path", "network", "reward", "objective", "offline", "solver"),
    "sample": ("name", "path", "network", "reward", "evaluation"),
    "evaluate": ("reward", "objective", "grid"),
    "exact": ("reward", "objective", "grid", "methods"),
}


def stage_digest(experiment: Experiment, stage: str, method: str | None = None) -> str:
    """Hash of just the sections that a stage reads, so that a change reruns only what it touches."""
    data = experiment.model_dump()
    sections = (*_STAGE_SECTIONS[stage], *experiment.reads_too.get(stage, ()))
    read: dict[str, Any] = {section: data[section] for section in sections}
    if method is not None:
        read["method"] = data["methods"][method]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]


def dump(experiment: Experiment) -> str:
    """The experiment as YAML that :func:`load_resolved` reads back."""
    return yaml.safe_dump(experiment.model_dump(), sort_keys=False)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged in; mappings merge key by key, all else is replaced.

    A mapping of another ``kind`` replaces the old one whole, since its other keys are parameters of
    that kind.
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_kind(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _same_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in old or "kind" not in new or old["kind"] == new["kind"]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, without any code in it being run."""
    if not path.is_file():
        near = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such file; experiments in {path.parent}: {near}")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not {type(data).__name__}")
    return data


class Case(Section):
    """One case of a study: another experiment with some keys changed."""

    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    of: str
    value: float | None = None
    set: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}


class StudyConfig(Section):
    """What a study varies, and its cases; ``set`` and ``methods`` are for cases that do not say otherwise.

    ``table`` chooses its table and its figure: rows along the axis for cases on tails; for cases on
    functionals ``hierarchy``, what FDC reaches of each, or ``solvers``, what each solver reaches at what
    cost.
    """

    axis: str
    table: Literal["axis", "hierarchy", "solvers"] = "axis"
    set: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    cases: Annotated[list[Case], Field(min_length=1)]


class Study(Section):
    """A file whose cases are experiments."""

    name: str
    title: str
    seeds: int | list[int]
    study: StudyConfig


class Skip(Section):
    """Cases of a study, by label, and methods that are left out of a file."""

    cases: list[str] = []
    methods: list[str] = []


def read_study(path: Path) -> Study | None:
    """The study in a file, or None for an ordinary experiment."""
    data = read_yaml(path)
    return validated(Study, data, path) if "study" in data else None


def load_file(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Experiment]:
    """The experiments of one file by name: one, or one per case of a study.

    Args:
        path: the YAML file; its ``name`` must be the file's.
        overrides: merged into every experiment last; but the key ``skip`` names, by file, cases and
            methods that are left out (see :class:`Skip`).

    Raises:
        ConfigError: naming the file, the key and the fix.
    """
    path = Path(path)
    overrides = dict(overrides or {})
    skip = _skip_of(overrides.pop("skip", {}), path)
    data = read_yaml(path)
    if data.get("name") != path.stem:
        raise ConfigError(
            f"{path}: key name: must be the file's own, {path.stem!r}, got {data.get('name')!r}"
        )
    study = read_study(path)
    if study is None:
        merged = merge({"base": path.stem, **data}, overrides)
        _leave_out(merged.get("methods", {}), skip, path)
        return {path.stem: validated(_class_of(merged), merged, path)}
    if unknown := set(skip.cases) - {case.label for case in study.study.cases}:
        raise ConfigError(f"{path}: key skip.{path.stem}.cases: there is no case {min(unknown)!r}")
    experiments = {}
    for case in study.study.cases:
        if case.label in skip.cases:
            continue
        parent = read_yaml(path.parent / f"{case.of}.yaml")
        name = f"{study.name}/{case.label}"
        if name in experiments:
            raise ConfigError(f"{path}: key study.cases: the label {case.label!r} occurs twice")
        changed = merge(merge(parent, study.study.set), case.set)
        own = {
            "name": name,
            "title": f"{study.title}: {case.label}",
            "base": case.of,
            "seeds": study.seeds,
            "methods": merge(study.study.methods, case.methods),
            "axis_value": case.value,
        }
        merged = merge({**changed, **own}, overrides)
        _leave_out(merged["methods"], skip, path)
        kind = _class_of(merged)
        if (kind is TailExperiment) != (study.study.table == "axis"):
            raise ConfigError(
                f"{path}: key study.table: must be axis if the cases are on tails, and hierarchy or solvers "
                f"if they are on functionals (got {study.study.table!r})"
            )
        experiments[name] = validated(kind, merged, path, case.label)
    return experiments


def _skip_of(by_file: Any, path: Path) -> Skip:
    if not isinstance(by_file, Mapping):
        raise ConfigError(f"{path}: key skip: must map names of files to cases and methods")
    return validated(Skip, by_file.get(path.stem, {}), path)


def _leave_out(methods: dict[str, Any], skip: Skip, path: Path) -> None:
    for name in skip.methods:
        if name not in methods:
            raise ConfigError(
                f"{path}: key skip.{path.stem}.methods: there is no method {name!r} ({', '.join(methods)})"
            )
        del methods[name]


def load_resolved(path: str | Path) -> Experiment:
    """An experiment from a file that :func:`dump` wrote, or from an ordinary experiment file."""
    path = Path(path)
    data = read_yaml(path)
    if "study" in data:
        raise ConfigError(f"{path}: is a study; name one of its cases' resolved files instead")
    return validated(_class_of(data), {"base": path.stem, **data}, path)


def _class_of(data: Mapping[str, Any]) -> type[Experiment]:
    """The kind of experiment that some data describe."""
    objective = data.get("objective")
    functional = isinstance(objective, Mapping) and "utility" in objective
    return FunctionalExperiment if functional else TailExperiment


def tail_experiment(experiment: Experiment) -> TailExperiment:
    """The experiment, if it is one on a tail.

    Raises:
        ConfigError: for one on another functional.
    """
    if not isinstance(experiment, TailExperiment):
        raise ConfigError(
            f"experiment {experiment.name}: this needs a tail; key objective must have tail, level and alpha"
        )
    return experiment


def method_of(experiment: Experiment, name: str) -> MethodConfig:
    """A method of the experiment by name."""
    if name not in experiment.methods:
        known = ", ".join(experiment.methods)
        raise ConfigError(f"experiment {experiment.name}: unknown method {name!r}; it has {known}")
    return experiment.methods[name]


def validated(kind: type[Model], data: Any, path: Path, case: str | None = None) -> Model:
    """Some data as a section of a configuration.

    Args:
        kind: of the section.
        data: plain, from a file.
        path: of the file, for messages.
        case: of a study, for messages.

    Raises:
        ConfigError: naming the file, the key and the fix; of the first three errors.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        where = f"{path} (case {case})" if case else str(path)
        raise ConfigError("; ".join(_explain(where, kind, e) for e in error.errors()[:3])) from None


def _explain(where: str, kind: type[BaseModel], error: Any) -> str:
    """One validation error as a sentence with the file, the key and the fix."""
    key = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    if error["type"] == "extra_forbidden":
        return (
            f"{where}: key {key}: unknown; known keys here: {', '.join(_known_keys(kind, error['loc'][:-1]))}"
        )
    if error["type"] == "missing":
        return f"{where}: key {key}: missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"{where}: key {key}: {message}"
    return f"{where}: key {key}: {message} (got {error['input']!r})"


def _changed(section: Model, changes: Mapping[str, Any], where: str) -> Model:
    """A section with some keys changed.

    Raises:
        ValueError: if that is no valid section; the message begins with ``where`` and names the key.
    """
    kind = type(section)
    try:
        return kind.model_validate(merge(section.model_dump(), changes))
    except ValidationError as error:
        raise ValueError(_explain(where, kind, error.errors()[0])) from None


def _known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at ``location``."""
    section: Any = kind
    for part in location:
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            continue  # an index, or a name chosen by the file
        annotation = fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        section = inner[0] if inner else annotation
    return list(getattr(section, "model_fields", {}))
