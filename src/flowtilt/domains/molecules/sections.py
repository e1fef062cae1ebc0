"""The sections of a configuration that belong to molecules. A workflow reads it: no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowtilt.configuration import Count, NotNegative, Positive, Section, Share

Level = Annotated[float, Field(gt=0, lt=1)]


class SubsetConfig(Section):
    """Which molecules of QM9: by their numbers of atoms, hydrogen included."""

    smallest: Count = 1
    largest: Count = 12

    @model_validator(mode="after")
    def _in_order(self) -> SubsetConfig:
        if self.smallest > self.largest:
            raise ValueError(f"smallest ({self.smallest}) must not be above largest ({self.largest})")
        return self


class UnitsConfig(Section):
    """See :class:`flowtilt.domains.molecules.states.Units`."""

    length: Positive = 1.25
    type_scale: Positive = 0.1


class MoleculeNetworkConfig(Section):
    """See :class:`flowtilt.domains.molecules.network.NetworkSettings`."""

    layers: Count = 4
    width: Count = 128
    vectors: Count = 16
    pair_width: Count = 48
    heads: Count = 8
    radial: Annotated[int, Field(ge=2)] = 24
    reach: Positive = 5.0

    @model_validator(mode="after")
    def _divisible(self) -> MoleculeNetworkConfig:
        for name in ("width", "vectors"):
            if getattr(self, name) % self.heads:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of heads ({self.heads})")
        return self


class CheckConfig(Section):
    """Molecules drawn during a training, for its curve of validity: how many, and after how many updates."""

    every: Count = 4000
    samples: Count = 500


class MoleculePretrainConfig(Section):
    """See :class:`flowtilt.pretraining.PretrainingSettings`; ``window`` is of the source of molecules,
    ``type_weight`` of the loss, and ``check`` says how the training is looked at."""

    updates: Count
    batch: Count = 64
    learning_rate: Positive = 1e-3
    warmup: Share = 0.01
    average: Annotated[float, Field(ge=0, lt=1)] = 0.9995
    gradient_clip: Positive = 1.0
    times: tuple[float, Positive] = (1.5, 1.2)
    window: Annotated[float, Field(gt=0, le=1)] = 1.0
    type_weight: Positive = 1.0
    bfloat16: bool = True
    compiled: bool = False
    check: CheckConfig = CheckConfig()


class MoleculeConfig(Section):
    """A flow on molecules: data, units, network and pretraining. ``name`` is that of its weights.

    ``time_power`` is of the times that samplers and solvers see it at, see
    :func:`flowtilt.interpolants.time_grid`; the weights do not depend on it.
    """

    name: str
    subset: SubsetConfig
    units: UnitsConfig = UnitsConfig()
    network: MoleculeNetworkConfig = MoleculeNetworkConfig()
    pretrain: MoleculePretrainConfig
    time_power: Positive = 1.0


class MoleculeModelConfig(Section):
    """The base model: the package's own flow, or one of the package FlowMol.

    ``name`` is that of the weights: our own follow from it and a seed, FlowMol's are downloaded by it.
    """

    kind: Literal["equivariant", "flowmol"] = "equivariant"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class CheckpointConfig(Section):
    """Weights of the pretrained model that are there already.

    ``path`` is relative to the folder of the workflow, ``sha256`` what the file must have. ``retrain``
    is the switch: with it the model is trained by the section ``pretrain``, and the file is not read.
    """

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    retrain: bool = False


class XTBConfig(Section):
    """See :class:`flowtilt.domains.molecules.xtb.XTBSettings`."""

    charge: int = 0
    unpaired: Annotated[int, Field(ge=0)] | None = None
    max_iterations: Count = 250
    closeness: NotNegative = 0.5
    binding: tuple[float, float] = (-0.5, 1.0)
    seconds: Positive = 60.0

    @model_validator(mode="after")
    def _in_order(self) -> XTBConfig:
        if self.binding[0] >= self.binding[1]:
            raise ValueError(f"binding must be in order, got {self.binding}")
        return self


class MoleculeObjective(Section):
    """The mean of the best share ``1 - level`` of minus the energy, under a KL weight.

    ``alpha`` is the KL weight of every method's objective, in hartree a nat, as in the papers: of am's mean
    as of the tails' means. Methods may have levels of their own; the table is led by the level here.
    """

    level: Level
    alpha: Positive


class MoleculeMethodConfig(Section):
    """One method. ``data`` are draws of the training data themselves, a row to compare with.

    ``level`` is of the tail of fdc and tfft, by default the objective's. ``rise`` is the share of the
    updates over which tfft's level rises to it, from one half: the mass of the tail falls geometrically,
    and each update has the threshold of its own level. ``iterations`` and ``step`` belong to fdc:
    ``step`` is the KL weight of the objective over that of a step, 1 the largest in theory. ``updates``
    and ``solver`` change the experiment's solver for this method alone.
    """

    kind: Literal["data", "pretrained", "am", "fdc", "tfft"]
    level: Level | None = None
    rise: Share | None = None
    iterations: Count | None = None
    step: Annotated[float, Field(gt=0, le=1)] | None = None
    updates: Count | None = None
    solver: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fields_of_kind(self) -> MoleculeMethodConfig:
        belongs = {"level": ("fdc", "tfft"), "rise": ("tfft",), "iterations": ("fdc",), "step": ("fdc",)}
        for key, kinds in belongs.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key} belongs to {' and '.join(kinds)}, not to {self.kind}; remove it")
        missing = [key for key in ("iterations", "step") if getattr(self, key) is None]
        if self.kind == "fdc" and missing:
            raise ValueError(f"an fdc method needs {' and '.join(missing)}")
        if not self.tuned and (self.solver or self.updates is not None):
            raise ValueError(f"solver and updates belong to methods that are fine-tuned, not to {self.kind}")
        return self

    @property
    def tuned(self) -> bool:
        """Whether the method has a fine-tuned model of its own."""
        return self.kind not in ("data", "pretrained")


class MoleculeEvaluationConfig(Section):
    """Molecules of each run, steps of order 4 of the flow that draws them, and how many are relaxed."""

    samples: Count
    ode_steps: Count
    relaxed: Annotated[int, Field(ge=0)]
