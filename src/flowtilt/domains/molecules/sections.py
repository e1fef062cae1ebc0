"""The sections of a configuration that belong to molecules. A workflow reads it: no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from flowtilt.pipeline.configuration import Count, Name, NotNegative, Positive, Section, Share
from flowtilt.pipeline.sections import LEVEL, TUNED, FitConfig, SearchedMethodConfig

Mass = Annotated[float, Field(gt=0, lt=1)]


StepWeights = Annotated[
    list[Positive],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if type(value) in (int, float) else value),
]
"""Of all steps, or of each one; a number stands for the list of it."""


class SubsetConfig(Section):
    """Which molecules of QM9: by their numbers of atoms."""

    smallest: Count = 1
    """Fewest atoms of a molecule, hydrogen included."""

    largest: Count = 12
    """Most atoms of a molecule, hydrogen included; QM9's have up to 29."""

    @model_validator(mode="after")
    def _in_order(self) -> SubsetConfig:
        if self.smallest > self.largest:
            raise ValueError(f"smallest ({self.smallest}) must not be above largest ({self.largest})")
        return self


class MoleculeAdapterConfig(Section):
    """Low-rank adapters of the network's linear layers (LoRA), fine-tuned instead of its weights."""

    rank: Count
    """Rank of an adapter."""

    alpha: Positive
    """Scale of an adapter, over its rank."""


class UnitsConfig(Section):
    """What one unit of a state stands for; see :mod:`flowtilt.domains.molecules.states`."""

    length: Positive = 1.25
    """Ångström in a unit of a state's coordinates."""

    type_scale: Positive = 0.1
    """Value of an atom type's column where it applies; the smaller, the later in time types come out of
    the noise."""


class MoleculeNetworkConfig(Section):
    """Sizes of the equivariant network; see :mod:`flowtilt.domains.molecules.network`."""

    layers: Count = 4
    """Rounds of exchange between atoms."""

    width: Count = 128
    """Scalar features of an atom, a multiple of ``heads``."""

    vectors: Count = 16
    """Vector features of an atom, a multiple of ``heads``."""

    pair_width: Count = 48
    """Scalar features of a pair of atoms, which take most of the time."""

    heads: Count = 8
    """Heads of the attention."""

    radial: Annotated[int, Field(ge=2)] = 24
    """Radial basis functions of a distance."""

    reach: Positive = 5.0
    """Distance of the last of them, in units of a state."""

    @model_validator(mode="after")
    def _divisible(self) -> MoleculeNetworkConfig:
        for name in ("width", "vectors"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of heads ({self.heads})")
        return self


class CheckConfig(Section):
    """Molecules drawn during a training, for its curve of validity."""

    every: Count = 4000
    """Updates between two checks."""

    samples: Count = 500
    """Molecules drawn at each check."""


class MoleculePretrainConfig(FitConfig):
    """Flow-matching pretraining; see :class:`flowtilt.pretraining.PretrainingSettings`."""

    warmup: Share = 0.01
    """Share of the updates over which the learning rate rises linearly."""

    average: Annotated[float, Field(ge=0, lt=1)] = 0.9995
    """Decay of the exponential moving average of the weights, which is the result; 0 for none."""

    times: tuple[float, Positive] = (1.5, 1.2)
    """Mean and standard deviation of the logit of the training times."""

    window: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the molecules, sorted by size, that a batch is drawn from: less than 1 makes batches of
    nearly one size, with little padding."""

    type_weight: Positive = 1.0
    """Weight of the atom types' cross entropy in the loss, beside the coordinates' mean square."""

    bfloat16: bool = True
    """Whether matrix products are computed in 16 bits, where that is faster."""

    compiled: bool = False
    """Whether torch compiles the loss, which takes minutes and a C++ compiler."""

    check: CheckConfig = CheckConfig()
    """Checks of the molecules during the training."""


class FlowSections(Section):
    """What a flow on molecules and its weights follow from."""

    subset: SubsetConfig
    """Which molecules of QM9."""

    units: UnitsConfig = UnitsConfig()
    """What one unit of a state stands for."""

    network: MoleculeNetworkConfig = MoleculeNetworkConfig()
    """Sizes of the network."""

    pretrain: MoleculePretrainConfig
    """How it is pretrained, if it is trained anew."""

    time_power: Positive = 1.0
    """Power p of the times 1 - (1 - u)^p of equally spaced u that samplers and solvers step along: above
    1, steps are denser towards the data; the weights do not depend on it."""


class MoleculeConfig(FlowSections):
    """A flow on molecules by itself."""

    name: Name
    """Name of the weights."""


class MoleculeModelConfig(Section):
    """The base model: the package's own flow, or one of the package FlowMol."""

    kind: Literal["equivariant", "flowmol"] = "equivariant"
    """``equivariant`` is the package's own flow; ``flowmol`` a model of the package FlowMol, of its Gaussian
    kind, with converted weights as ``checkpoint``: docs/molecules.md says how. The sections ``units``,
    ``network`` and ``pretrain`` are then not used."""

    name: Name
    """Name of the weights: one's own follow from it and a seed; FlowMol's are those of its model of this
    name, as ``qm9_gaussian``."""


class CheckpointConfig(Section):
    """Weights of the pretrained model that are there already, and the switch that trains it instead."""

    path: str
    """File of the weights (safetensors), relative to the workflow's folder; its record, of the same name
    with the ending json, lies beside it."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 that the file must have."""

    retrain: bool = False
    """Whether the model is trained anew, by the section ``pretrain``, and the file not read."""


class XTBConfig(Section):
    """GFN1-xTB energies; :class:`flowtilt.domains.molecules.xtb.XTBSettings` has the bounds' reasons."""

    charge: int = 0
    """Charge of every molecule, in elementary charges."""

    unpaired: Annotated[int, Field(ge=0)] | None = None
    """Unpaired electrons; without it as few as possible, none or one."""

    max_iterations: Count = 250
    """Iterations of the self-consistent field after which a molecule has failed."""

    closeness: NotNegative = 0.5
    """Smallest distance of two atoms over the sum of their covalent radii; closer ones have failed."""

    binding: tuple[float, float] = (-0.5, 1.0)
    """Bounds, in hartree an atom, on the energy above that of the separated neutral atoms, for an energy
    to be believed; a charge widens them."""

    seconds: Positive = 60.0
    """Processor time that one molecule may take, in seconds."""

    type_gradient: Literal["none", "separated_atoms"] = "none"
    """The reward's gradient on atom types: ``none``, or that of the energy of the ``separated_atoms``, the
    part that is linear in the types; see :class:`flowtilt.domains.molecules.energies.XTBReward`."""

    failed: float | None = None
    """What minus the energy of a molecule without an energy counts as in training, in hartree; by default
    such molecules are left out. Measurements leave them out either way."""

    @model_validator(mode="after")
    def _in_order(self) -> XTBConfig:
        if self.binding[0] >= self.binding[1]:
            raise ValueError(f"binding must be in order, got {self.binding}")
        return self

    @property
    def calculation(self) -> dict[str, Any]:
        """The keys of the calculation: arguments of :class:`flowtilt.domains.molecules.xtb.XTBSettings`."""
        return self.model_dump(exclude={"type_gradient", "failed"})


class MoleculeObjective(Section):
    """The mean of the best share of minus the energy, under a KL weight.

    As in the papers, ``alpha`` is the weight of am's mean as of the tails' means.
    """

    renamed: ClassVar[Mapping[str, str]] = {"level": LEVEL}

    mass: Mass
    """Share of probability in the tail, the best of minus the energy; one minus the papers' quantile level b.
    The table is led by it; methods may have masses of their own."""

    alpha: Positive
    """KL weight of every method's objective, in hartree a nat."""


class BarrierConfig(Section):
    """A log barrier: ``strength`` times the log of what is left of ``bound`` by the share of molecules that
    are not valid, as :mod:`flowtilt.domains.molecules.chemistry` has it."""

    bound: Annotated[float, Field(gt=0, le=1)]
    """What that share must stay below; the pretrained model's own must be below too."""

    strength: Positive
    """Weight of the barrier, in hartree."""


class MoleculeMethodConfig(SearchedMethodConfig):
    """One method of an experiment on molecules."""

    renamed: ClassVar[Mapping[str, str]] = {"level": LEVEL, "rise": "narrowing"}

    kind: Literal["data", "pretrained", "am", "fdc", "tfft", "best_of", "resampled", "steered"]
    """``data`` are draws of the training data, a row to compare with; ``pretrained`` is not fine-tuned;
    ``am`` is Adjoint Matching on the mean; ``fdc`` is Flow Density Control; ``tfft`` is Tail-aware Flow
    Fine-Tuning. The others train nothing, and keep molecules of the pretrained model: ``best_of`` the best of
    every ``n``, ``resampled`` those of the offline batch, ``steered`` particles of sequential Monte Carlo."""

    mass: Mass | None = None
    """Mass of the method's own tail, by default that of ``objective``; for ``fdc`` and ``tfft``."""

    alpha: NotNegative | None = None
    """The method's own KL weight, by default that of ``objective``; not 0 but for ``fdc`` by scores, which
    then has a ``step_weight``."""

    narrowing: Share | None = None
    """Share of the updates over which the tail narrows: its mass falls from ``narrowing_from`` to ``mass``;
    for ``tfft``."""

    narrowing_from: Annotated[float, Field(gt=0, le=1)] | None = None
    """Mass that a tail narrows from, one half by default; at 1 the reward's mean is raised."""

    narrowing_by: Literal["geometric", "linear"] | None = None
    """How the mass falls: by the same factor in each update, the default, or by the same difference, as the
    papers' level then rises."""

    adapter: MoleculeAdapterConfig | None = None
    """Adapters that are fine-tuned; without them, all weights of the network are."""

    threshold: float | None = None
    """Where the hinge of ``tfft`` bends, in hartree of minus the energy, instead of at the solution of its
    dual on the offline batch."""

    step: Annotated[float, Field(gt=0, le=1)] | None = None
    """KL weight of the objective over that of a step, 1 being the largest step in theory; for ``fdc``,
    which must have it, or ``step_weight``, where it goes by scores."""

    step_weight: StepWeights | None = None
    """KL weight of a step of ``fdc`` (the papers' eta), in hartree a nat, instead of ``step``: a number for
    all, or a list with one for each iteration."""

    score_time: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Time at which ``fdc`` compares scores; by default the last one that the solver trains."""

    barrier: BarrierConfig | None = None
    """Constraint on the share of molecules that are not valid, for ``fdc`` by ``exponents``; its values are
    enough."""

    @model_validator(mode="after")
    def _fields_of_kind(self) -> MoleculeMethodConfig:
        if self.barrier is not None and self.by != "exponents":
            raise ValueError("barrier: validity has values and no gradient; set by: exponents, or drop it")
        of_fdc = dict.fromkeys(("iterations", "step", "step_weight", "score_time", "by"), ("fdc",))
        of_tuned = dict.fromkeys(("alpha", "adapter"), TUNED)
        of_tfft = dict.fromkeys(("narrowing", "narrowing_from", "narrowing_by", "threshold"), ("tfft",))
        self.check_keys({"mass": ("fdc", "tfft"), **of_tuned, **of_tfft, **of_fdc})
        if self.narrowing is None and (self.narrowing_from is not None or self.narrowing_by is not None):
            raise ValueError("narrowing_from and narrowing_by say how a tail narrows; add narrowing")
        if self.narrowing is not None and self.threshold is not None:
            raise ValueError("threshold is of one problem, and narrowing has one for every update; drop one")
        if self.step is not None and self.step_weight is not None:
            raise ValueError("step and step_weight both say how long steps are; give one of them")
        if self.step_weight is not None and len(self.step_weight) not in (1, self.iterations):
            raise ValueError(
                f"step_weight must be a number, or have one for each of the {self.iterations} iterations, "
                f"got {len(self.step_weight)}"
            )
        if self.alpha == 0 and (self.kind != "fdc" or self.step_weight is None):
            raise ValueError("alpha must be positive, but for an fdc method with a step_weight")
        return self


class MoleculeEvaluationConfig(Section):
    """How each run is measured."""

    samples: Count
    """Molecules of each run, drawn by the probability-flow ODE."""

    ode_steps: Count
    """Time steps of the ODE solver of order 4."""

    relaxed: Annotated[int, Field(ge=0)]
    """How many of the molecules have their geometry optimised, the first ones."""
