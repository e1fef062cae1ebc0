"""The sections of an experiment's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from flowtilt.pipeline.configuration import Count, NotNegative, Positive, Row, Section, Share
from flowtilt.words import Tail, read_tail

TailKey = Annotated[Tail, BeforeValidator(read_tail)]


LEVEL = "mass: the share of probability in the tail, for an upper tail one minus the level"
"""What became of the key ``level``; see :attr:`flowtilt.pipeline.configuration.Section.renamed`."""


class TailSpec(NamedTuple):
    """The tail problem of one method: what its offline threshold and its single solve are for.

    Attributes:
        tail: ``lower`` or ``upper``.
        mass: probability of the tail, in (0, 1).
        alpha: KL weight, in units of the reward a nat.
    """

    tail: Tail
    mass: float
    alpha: float


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


class OfflineConfig(Section):
    """Size of the batches that thresholds and linearisations come from."""

    samples: Count
    """Samples of the pretrained model for TFFT's threshold, of the current one for each of FDC's
    linearisations, and of both for divergences that compare samples."""


class FitConfig(Section):
    """One training of a network; see :class:`flowtilt.pretraining.PretrainingSettings`."""

    updates: Count
    """Optimiser steps."""

    batch: Count = 64
    """Examples an update."""

    learning_rate: Positive = 1e-3
    """Largest learning rate of Adam; a cosine takes it to zero."""

    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the updates over which the learning rate rises linearly."""

    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the exponential moving average of the weights, which then is the result; 0 for none."""

    gradient_clip: Positive = 1.0
    """Bound on the norm of the parameters' gradient."""


Moment = Annotated[float, Field(ge=0, lt=1)]
PartEnd = Annotated[float, Field(gt=0, le=1)]


class SolverConfig(Section):
    """The control solver of all methods, of which a method may change keys for itself.

    The modules :mod:`flowtilt.control.adjoint_matching`, :mod:`flowtilt.control.weighted_fitting` and
    :mod:`flowtilt.control.annealed_fitting` say how each works. Keys that belong to one of them say so;
    those of weighted fitting are also those of each stage of annealed fitting.
    """

    kind: Literal["adjoint_matching", "weighted_fitting", "annealed_fitting"] = "adjoint_matching"
    """``adjoint_matching`` follows the reward's gradient along trajectories; ``weighted_fitting`` takes
    its values alone; ``annealed_fitting`` is weighted fitting in stages, for tilts that one bank does not
    carry."""

    updates: Count
    """Optimiser steps of each solve."""

    batch: Annotated[int, Field(ge=2)]
    """Trajectories, or for weighted fitting samples of the bank, that enter an update."""

    pool: Count
    """Trajectories drawn for each update of a tilt that is zero for most of them, at least ``batch``; the
    pool is thinned to the batch by strata. Adjoint Matching."""

    active_batch: Count | None = None
    """Most trajectories of a batch on which the tilt is not zero, where there are enough others; half of it
    by default. Adjoint Matching."""

    buffer: Count | None = None
    """Trajectories that are kept with their adjoints, a multiple of ``batch`` and at most ``pool``: a pass
    takes each once, in mini-batches of ``batch`` that are drawn anew for each pass. By default those of a
    batch. Adjoint Matching."""

    steps: Annotated[int, Field(ge=2)]
    """Time steps of the memoryless process, also of that which draws the offline batch."""

    learning_rate: Positive
    """Largest learning rate of Adam."""

    warmup: Share
    """Share of the updates over which the learning rate rises linearly."""

    annealing: Literal["cosine", "none"] = "cosine"
    """What takes the learning rate to zero after the warm-up; ``none`` leaves it as it is."""

    moments: tuple[Moment, Moment] = (0.9, 0.999)
    """Decay rates of Adam's means of gradients and of their squares."""

    weight_decay: NotNegative = 0.0
    """Share of the weights that an update takes off them, times the learning rate: AdamW's."""

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

    endpoint_perturbations: Annotated[int, Field(ge=0)] = 0
    """At how many perturbed ends a pathwise gradient is taken, of which the mean counts: the gradient of the
    tilt smoothed by a Gaussian. 0 is the end itself. Adjoint Matching."""

    endpoint_deviation: NotNegative = 0.0
    """Standard deviation of these perturbations, in units of the state. Adjoint Matching."""

    endpoint_percentile: Annotated[float, Field(gt=0, le=100)] | None = None
    """Percentile of the sizes of the entries of one sample's pathwise gradient that larger entries are cut
    to; without it none are. Adjoint Matching."""

    adjoint_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Time, of 0 to 1, from which on steps are in the loss and adjoints are solved. Adjoint Matching."""

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

    loss_steps: tuple[tuple[PartEnd, Annotated[int, Field(ge=0)]], ...] | None = None
    """Parts of the time steps, instead of the two shares: where each ends, as a share of the steps from
    ``adjoint_from`` on, and how many steps of it are drawn for each update. ``[[0.6, 2], [1, 2]]`` draws two
    of the first 60 % and two of the others. Adjoint Matching."""

    passes: Count = 1
    """How often each of the trajectories is trained on, each time with time steps of its own. Adjoint
    Matching."""

    micro_batch: Count | None = None
    """Most trajectories whose regression is in memory at once, all others waiting, and whose adjoints are
    solved together; without it those of a batch. Adjoint Matching."""

    bank: Count = 20000
    """Samples of the base model that are weighted. Weighted fitting."""

    bank_steps: Count = 16
    """Time steps of the ODE solver of order 4 that draws the bank. Weighted fitting."""

    penalty: Literal["kl", "pearson", "cressie_read_3", "reverse_kl", "squared_hellinger"] = "kl"
    """Divergence from the base that the weights pay for. Weighted fitting; annealed fitting has ``kl``."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Effective samples that the weights of a stage keep, as a share of its bank, and those of a step of FDC
    that is searched. Annealed fitting, and FDC by exponents."""

    minimum_ess: NotNegative = 50.0
    """Effective samples below which a bank is refused; what a stage or a searched step adds rests on as many.
    Weighted fitting, and FDC by exponents."""

    stages: Count = 20
    """Most stages, each with as many updates as a solve. Annealed fitting."""

    kl: Positive | None = None
    """Divergence from the pretrained model at which a method ends, in nats; KL weights then follow from it,
    and what a method has of its own does not count. Without it there is no budget. Annealed fitting, and FDC
    by exponents."""

    stage_kl: Positive | None = None
    """What each stage or step adds to that divergence, in nats, at most ``kl``; without it one stage is to
    reach all of it. Where a bank does not carry that, it takes more of them."""

    @model_validator(mode="after")
    def _keys_fit(self) -> SolverConfig:
        if self.stage_kl is not None and (self.kl is None or self.stage_kl > self.kl):
            raise ValueError(
                f"stage_kl ({self.stage_kl:g}) must be at most kl ({self.kl}), the divergence of all stages"
            )
        if self.kind == "adjoint_matching":
            self._check_matching()
        if self.kind == "annealed_fitting" and self.penalty != "kl":
            raise ValueError(
                f"penalty must be kl where kind is annealed_fitting, got {self.penalty}: only exponential "
                "tilts of tilts are tilts"
            )
        if self.adjoint == "posterior_mean" and self.endpoint_gradient != "pathwise":
            raise ValueError(
                "endpoint_gradient must be pathwise where adjoint is posterior_mean, which takes the "
                "gradient at the end of a trajectory"
            )
        return self

    def _check_matching(self) -> None:
        """Refuse what the settings of :mod:`flowtilt.control.adjoint_matching` would, before a run."""
        kept, name = (self.batch, "batch") if self.buffer is None else (self.buffer, "buffer")
        if self.pool < kept:
            raise ValueError(f"pool ({self.pool}) must be at least {name} ({kept})")
        if kept % self.batch:
            raise ValueError(f"buffer ({kept}) must be a multiple of batch ({self.batch})")
        if self.active_batch is not None and self.active_batch >= self.batch:
            raise ValueError(f"active_batch ({self.active_batch}) must be below batch ({self.batch})")
        if (self.endpoint_perturbations > 0) != (self.endpoint_deviation > 0):
            raise ValueError(
                "endpoint_perturbations and endpoint_deviation belong together; give both or none"
            )
        changed = self.endpoint_perturbations > 0 or self.endpoint_percentile is not None
        if changed and self.endpoint_gradient != "pathwise":
            raise ValueError(
                "endpoint_gradient must be pathwise where endpoint_perturbations or endpoint_percentile is "
                "given, which are of gradients"
            )
        if self.loss_steps is not None:
            ends = [end for end, _ in self.loss_steps]
            if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
                raise ValueError(f"the ends in loss_steps must grow to 1, got {ends}")
            if not any(count for _, count in self.loss_steps):
                raise ValueError("loss_steps draws no step at all; raise one of its numbers")


class MethodConfig(Section):
    """One method of an experiment; a domain adds its own keys."""

    kind: str
    """What is done: ``pretrained`` is not fine-tuned; ``am`` is Adjoint Matching, ``fdc`` Flow Density
    Control and ``tfft`` Tail-aware Flow Fine-Tuning. The others train nothing, and keep samples of the
    pretrained model: ``best_of`` the best of every ``n``; ``resampled`` those of the offline batch by
    importance resampling; ``steered`` particles of sequential Monte Carlo."""

    iterations: Count | None = None
    """Linearisations, each with a solve; for ``fdc``, which must have it."""

    updates: Count | None = None
    """Optimiser steps of each of the method's solves, instead of the solver's."""

    solver: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``solver`` that are changed for this method alone."""

    n: Annotated[int, Field(ge=2)] | None = None
    """Fresh samples of the pretrained model that each kept one has the largest reward of; for ``best_of``,
    which must have it."""

    of: str | None = None
    """Name of the method of kind am or tfft whose tilt the samples are kept by: the reward over its KL
    weight, or the hinge at the threshold of the offline batch over its own; by default the reward, as of an
    am. For ``resampled`` and ``steered``."""

    particles: Annotated[int, Field(ge=2)] | None = None
    """Trajectories for each sample that is kept, by default 4; for ``steered``."""

    every: Count | None = None
    """Time steps from one weighting of the particles to the next, by default 1; for ``steered``."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Effective share of a context's particles below which they are resampled, by default 0.5; for
    ``steered``."""

    @property
    def tuned(self) -> bool:
        """Whether the method has a fine-tuned model of its own."""
        return self.kind in TUNED

    @property
    def keeps(self) -> bool:
        """Whether the method trains nothing and keeps samples of the pretrained model."""
        return self.kind in KEPT

    @model_validator(mode="after")
    def _keeps_by_its_own_keys(self) -> MethodConfig:
        for key, kinds in _KEYS_OF_KEPT.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key} belongs to {' and '.join(kinds)}, not to {self.kind}; remove it")
        if self.kind == "best_of" and self.n is None:
            raise ValueError("a best_of method needs n, the samples that each kept one is the best of")
        others = [key for key in ("iterations", "updates", "solver") if getattr(self, key)]
        if self.keeps and others:
            raise ValueError(
                f"{' and '.join(others)} belong to methods that are fine-tuned, not to {self.kind}; "
                "remove them"
            )
        return self

    def check_keys(self, belongs: Mapping[str, Sequence[str]]) -> None:
        """Refuse keys of other kinds of methods, and an fdc without its iterations and step.

        Args:
            belongs: the kinds that a key is for, by key.

        Raises:
            ValueError: naming the key.
        """
        for key, kinds in belongs.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key} belongs to {' and '.join(kinds)}, not to {self.kind}; remove it")
        missing = [key for key in ("iterations", "step") if getattr(self, key) is None]
        if getattr(self, "step_weight", None) is not None:
            missing = [key for key in missing if key != "step"]
        if self.kind == "fdc" and missing == ["step"] and "by" in belongs:
            if self.by != "exponents":  # type: ignore[attr-defined]
                raise ValueError("an fdc method needs step, or by: exponents, which searches the steps")
        elif self.kind == "fdc" and missing:
            raise ValueError(f"an fdc method needs {' and '.join(missing)}")
        if not self.tuned and (self.solver or self.updates is not None):
            raise ValueError(f"solver and updates belong to methods that are fine-tuned, not to {self.kind}")


class SearchedMethodConfig(MethodConfig):
    """A method of a domain whose fdc can go by values alone."""

    by: Literal["scores", "exponents"] | None = None
    """Where ``fdc`` takes the divergence's first variation from: the models' ``scores``, the default, or the
    ``exponents`` that its steps have added up. The latter is for KL divergences and for utilities whose first
    variation has values, and needs values alone. Without a step it searches each step's KL weight: the one
    that raises the objective most on the batch of the current model, among those that keep
    ``solver.share`` of it."""


TUNED = ("am", "fdc", "tfft")
"""Kinds of methods that are fine-tuned."""

KEPT = ("best_of", "resampled", "steered")
"""Kinds of methods that train nothing, and keep samples of the pretrained model."""

_KEYS_OF_KEPT = {
    "n": ("best_of",),
    "of": ("resampled", "steered"),
    **dict.fromkeys(("particles", "every", "share"), ("steered",)),
}
"""The kinds that their keys are for."""


def check_methods(methods: Mapping[str, MethodConfig], solutions: Sequence[str]) -> None:
    """Refuse methods whose names stand for something else in the results' files and rows. Raises ValueError,
    naming the method and the fix."""
    for name, method in methods.items():
        if name in solutions:
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
        of, _, solution = name.rpartition("_")
        if of in methods and solution in solutions:
            raise ValueError(f"methods.{name}: the name is taken by a row of the method {of}; rename it")


def check_tilt(key: str, of: str, methods: Mapping[str, MethodConfig]) -> None:
    """Refuse a method that has no fixed tilt to keep samples by. Raises ValueError, naming the key and the
    fix."""
    cure = "name a method of kind am or tfft, or remove the key, for the reward over alpha"
    if of not in methods:
        raise ValueError(f"{key}: there is no method {of!r} ({', '.join(methods)}); {cure}")
    if methods[of].kind not in ("am", "tfft"):
        raise ValueError(
            f"{key}: the method {of!r} is of kind {methods[of].kind}, without a fixed tilt; {cure}"
        )
