"""The plan of a configuration: which experiments are run, the files of their runs, and what each job reads.

Plain functions of the validated configuration. The workflow's rules ask them, and unit tests call them in
milliseconds: neither Snakemake nor numpy nor torch is imported here. Paths are relative to the project's
folder. What belongs to one domain is in a class of its own, see :data:`DOMAINS`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.experiment import (
    AnyExperiment,
    Experiment,
    FunctionalExperiment,
    TailExperiment,
    dump,
    image_experiment,
    method_of,
    molecule_experiment,
    planar_experiment,
    read_study,
    stage_digest,
)
from flowtilt.pipeline.resources import RULES
from flowtilt.pipeline.theory.config import TheoryConfig

Files = Mapping[str, Mapping[str, AnyExperiment]]
"""Experiments by name, by the name of their file."""

Inputs = dict[str, str] | dict[str, list[str]]


def experiment_file(name: str) -> str:
    """The file of an experiment or a study."""
    return f"config/experiments/{name}.yaml"


def theory_file(name: str) -> str:
    """The file of a study of the theory."""
    return f"config/theory/{name}.yaml"


def unique(files: Iterable[str]) -> list[str]:
    """The files in their order, each once."""
    return list(dict.fromkeys(files))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a configuration stands for; :func:`flowtilt.pipeline.checks.read_plan` makes it.

    Attributes:
        config: what is run.
        files: every experiment file that is needed.
        theory: studies of the theory by name.
    """

    config: WorkflowConfig
    files: Files
    theory: Mapping[str, TheoryConfig]

    # ------------------------------------------------------------------------- which experiments

    @cached_property
    def experiments(self) -> dict[str, AnyExperiment]:
        """All experiments, cases of studies among them, by name."""
        return {name: experiment for cases in self.files.values() for name, experiment in cases.items()}

    @cached_property
    def studies(self) -> list[str]:
        """Files that are studies."""
        return [name for name, cases in self.files.items() if name not in cases]

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods of all experiments."""
        return sorted({method for experiment in self.experiments.values() for method in experiment.methods})

    @cached_property
    def image_models(self) -> list[str]:
        """Names of the models that pictures are drawn by."""
        return sorted(
            {case.model.name for case in self.experiments.values() if isinstance(case, ImageExperiment)}
        )

    def of_kind(self, kind: type) -> list[str]:
        """Names of the experiments of a kind."""
        return [name for name, experiment in self.experiments.items() if isinstance(experiment, kind)]

    def files_of_kind(self, kind: type) -> list[str]:
        """Names of the files whose experiments are all of a kind."""
        return [
            name for name, cases in self.files.items() if all(isinstance(c, kind) for c in cases.values())
        ]

    def domain(self, experiment: AnyExperiment) -> Domain:
        """What a domain knows of its own experiments' files."""
        return DOMAINS[next(kind for kind in DOMAINS if isinstance(experiment, kind))](self)

    def domain_of_file(self, name: str) -> Domain:
        """The domain of a file's experiments."""
        return self.domain(next(iter(self.files[name].values())))

    # ------------------------------------------------------------------------ digests and addresses

    @cached_property
    def config_files(self) -> dict[str, str]:
        """The resolved configuration that the jobs of each experiment read, at its content's address."""
        return {
            name: f"{self.config.results}/configs/{name}/{_hash(experiment.model_dump())[:16]}.yaml"
            for name, experiment in self.experiments.items()
        }

    def config_file(self, experiment: str, **_: str) -> str:
        """The resolved configuration of a job's experiment."""
        return self.config_files[experiment]

    def config_files_of(self, name: str, **_: str) -> list[str]:
        """Resolved configurations of all experiments of a file."""
        return [self.config_files[experiment] for experiment in self.files[name]]

    def model_config_file(self, model: str, **_: str) -> str:
        """The resolved configuration that a model of pictures is trained by."""
        return self.config_files[self.trained_for(model)]

    def resolved(self, experiment: str) -> str:
        """The text of an experiment's resolved configuration."""
        return dump(self.experiments[experiment])

    def digest(self, stage: str, experiment: str, method: str | None = None, **_: str) -> str:
        """Hash of what a stage reads of a job's experiment: the job runs again when it changes."""
        return _digest(self, stage, experiment, method)

    def digests(self, stage: str, name: str) -> list[str]:
        """Those of all experiments of a file."""
        return [self.digest(stage, experiment) for experiment in self.files[name]]

    def model_digest(self, model: str, **_: str) -> str:
        """Hash of what the training of a model of pictures reads."""
        return self.digest("pretrain", self.trained_for(model))

    def config_hash(self) -> str:
        """Hash of all that is configured: the experiments, and which of them are run."""
        chosen = {key: getattr(self.config, key) for key in ("experiments", "resolution")}
        experiments = {name: experiment.model_dump() for name, experiment in self.experiments.items()}
        return _hash([chosen, experiments, {name: study.model_dump() for name, study in self.theory.items()}])

    @cached_property
    def overrides(self) -> str:
        """What is merged into experiments, as the command line takes it."""
        return json.dumps(self.config.changes, sort_keys=True)

    def theory_overrides(self, theory: str) -> str:
        """What is merged into a study of the theory, as the command line takes it."""
        return json.dumps(self.config.theory_overrides.get(theory, {}), sort_keys=True)

    # ------------------------------------------------------------------------------- resources

    def memory(self, rule: str, attempt: int = 1) -> int:
        """Memory of a rule's job in MB: twice and three times as much when it is tried again."""
        return RULES[rule].memory(self.config) * attempt

    def minutes(self, rule: str, attempt: int = 1) -> int:
        """Time of a rule's job."""
        return RULES[rule].minutes(self.config) * attempt

    def gpus(self, rule: str) -> int:
        """GPUs of a rule's job."""
        return RULES[rule].gpus(self.config)

    def group(self, rule: str) -> str | None:
        """The group whose jobs share a submission to a cluster."""
        return RULES[rule].group_in(self.config)

    @property
    def together(self) -> str:
        """What stands before the command of a fine-tuning that several processes share."""
        number = self.config.processes
        return f"torchrun --standalone --nproc-per-node {number} --no-python " if number > 1 else ""

    def threads_of_each(self, threads: int) -> int:
        """Threads of each of the processes that share a job."""
        return max(1, threads // self.config.processes)

    # ----------------------------------------------------------------------------- files of runs

    def run_folder(self, experiment: str, method: str, seed: int | str) -> str:
        """Folder of a run."""
        return f"{self.config.results}/runs/{experiment}/{method}/seed{seed}"

    def kind_of(self, experiment: str, method: str) -> str:
        """The kind of a method: pretrained, am, fdc or tfft; on molecules also data.

        Raises:
            ConfigError: if the experiment has no such method.
        """
        return method_of(self.experiments[experiment], method).kind

    def run_files(self, name: str, *kinds: str) -> list[str]:
        """Files of all runs that the table and the figures of an experiment file rest on.

        Args:
            name: of the experiment file.
            kinds: names of files, such as ``metrics.json``; all if none is given.
        """
        files = unique(
            file for case in self.files[name].values() for file in self.domain(case).run_files(case.name)
        )
        return [file for file in files if not kinds or Path(file).name in kinds]

    def read_by_table(self, name: str) -> list[str]:
        """What the table and the figure of a file are made from: metrics, and for solvers their costs too."""
        return self.domain_of_file(name).read_by_table(name)

    def tables_of(self, name: str) -> list[str]:
        """The table of a file, in each of its forms."""
        return [f"{self.config.results}/tables/{name}.{extension}" for extension in ("csv", "md", "tex")]

    def figures_of(self, name: str) -> list[str]:
        """Figures of an experiment file."""
        figures = f"{self.config.results}/figures"
        if name in self.studies:
            return [f"{figures}/{name}.png"]
        return [f"{figures}/{name}_{kind}.png" for kind in self.domain_of_file(name).figures(name)]

    def for_all(self, files_of: Callable[[str], list[str]]) -> list[str]:
        """The files of all experiment files that are run, each once."""
        return unique(file for name in self.config.experiments for file in files_of(name))

    # ---------------------------------------------------------------------------------- targets

    @cached_property
    def runs(self) -> list[str]:
        """Files of all runs. Targets ask for them too: Snakemake otherwise takes tables that are there, as in
        a fresh clone, for a sign that nothing is left to do."""
        results = self.config.results
        theory = [f"{results}/theory/{name}.json" for name in self.theory]
        return [*self.for_all(self.run_files), f"{results}/resolution.json", *theory]

    @cached_property
    def tables(self) -> list[str]:
        """All tables."""
        beside = [f"{self.config.results}/tables/{name}.csv" for name in ("comparison", "by_seed")]
        theory = [file for name in self.theory for file in self.tables_of(f"theory_{name}")]
        return [*self.for_all(self.tables_of), *beside, *self.tables_of("costs"), *theory]

    @cached_property
    def figures(self) -> list[str]:
        """All figures."""
        theory = [f"{self.config.results}/figures/theory_{name}.png" for name in self.theory]
        return [*self.for_all(self.figures_of), *theory]

    @cached_property
    def pages(self) -> list[str]:
        """All pages of the report."""
        theory = [f"theory_{name}" for name in self.theory]
        names = [*self.config.experiments, *theory, "comparison", "costs", "provenance"]
        return [f"{self.config.results}/pages/{name}.html" for name in names]

    @cached_property
    def pretrained_models(self) -> list[str]:
        """Weights of all pretrained models."""
        return [file for file in self.runs if file.endswith("model.safetensors") and "/pretrained/" in file]

    @cached_property
    def theories(self) -> list[str]:
        """All that is made of the theory."""
        names = {f"theory_{name}" for name in self.theory}
        found = [file for file in (*self.tables, *self.figures) if Path(file).stem in names]
        return [*found, *(f"{self.config.results}/theory/{name}.json" for name in self.theory)]

    # ------------------------------------------------------------------------- inputs of all domains

    def threshold_input(self, experiment: str, method: str, seed: str) -> dict[str, str]:
        """The threshold of a run that has one."""
        if self.kind_of(experiment, method) != "tfft":
            return {}
        return {"threshold": f"{self.run_folder(experiment, method, seed)}/threshold.json"}

    def training_inputs(self, experiment: str, method: str, seed: str) -> dict[str, str]:
        """What the evaluation of a run reads beside its samples."""
        if self.kind_of(experiment, method) in ("data", "pretrained"):
            return {}
        history = {"history": f"{self.run_folder(experiment, method, seed)}/history.csv"}
        return {**history, **self.threshold_input(experiment, method, seed)}

    # ------------------------------------------------------------------------------- in the plane

    def base_folder(self, experiment: str, seed: str, **_: str) -> str:
        """Folder of the pretrained model that a job's experiment starts from."""
        return self.run_folder(self.experiments[experiment].base, "pretrained", seed)

    def base_model(self, experiment: str, seed: str, **_: str) -> str:
        """The pretrained model."""
        return f"{self.base_folder(experiment, seed)}/model.safetensors"

    def base_density(self, experiment: str, seed: str, **_: str) -> str:
        """Its density."""
        return f"{self.base_folder(experiment, seed)}/density.npz"

    def finetune_inputs(self, experiment: str, method: str, seed: str) -> dict[str, str]:
        """What a run needs beyond the pretrained model: a threshold, or the model of an earlier run."""
        if threshold := self.threshold_input(experiment, method, seed):
            return threshold
        start = method_of(planar_experiment(self.experiments[experiment]), method).continue_from
        if start is None:
            return {}
        return {"start": f"{self.run_folder(experiment, start, seed)}/model.safetensors"}

    def resolution_runs(self, file: str) -> list[str]:
        """One file of each Adjoint Matching run that the network's resolution is measured from.

        Args:
            file: with the fields ``experiment``, ``base``, ``method`` and ``seed``.
        """
        return [
            file.format(experiment=case.name, base=case.base, method=method, seed=seed)
            for case in self.files[self.config.resolution].values()
            for method, settings in case.methods.items()
            if settings.kind == "am"
            for seed in case.seeds
        ]

    def resolution_configs(self) -> list[str]:
        """Resolved configurations of those runs."""
        return [self.config_files[name] for name in self.resolution_runs("{experiment}")]

    def measured_runs(self, name: str) -> list[str]:
        """What the runs of a file are measured from, for any ``{seed}``."""
        return unique(
            file
            for case in self.files[name].values()
            for file in Planar(self).made(case.name, "{seed}")
            if Path(file).name not in ("samples.npz", "metrics.json")
        )

    def measured_files(self, name: str) -> list[str]:
        """What the measurement of a file's runs writes, for any ``{seed}``."""
        laws = [] if name in self.files_of_kind(TailExperiment) else ["laws.npz"]
        return [
            f"{self.run_folder(case.name, method, '{seed}')}/{file}"
            for case in self.files[name].values()
            for method in case.methods
            for file in ["samples.npz", "metrics.json", *laws]
        ]

    # ------------------------------------------------------------------------------- on molecules

    def shared_folder(self, experiment: str, **_: str) -> str:
        """Folder of what all methods of an experiment start from, in the experiment that it derives from."""
        return f"{self.config.results}/runs/{self.experiments[experiment].base}/pretrained"

    def shared_model(self, experiment: str, **_: str) -> str:
        """The pretrained model."""
        return f"{self.shared_folder(experiment)}/model.safetensors"

    def shared_offline(self, experiment: str, seed: str, **_: str) -> str:
        """The offline batch."""
        return f"{self.shared_folder(experiment)}/seed{seed}/offline.npz"

    def checkpoint_of(self, experiment: str) -> list[str]:
        """The shipped weights and their record, if the pretrained model is taken from them."""
        shipped = molecule_experiment(self.experiments[experiment]).checkpoint
        files = [] if shipped.retrain else [Path(shipped.path), Path(shipped.path).with_suffix(".json")]
        return [str(file) for file in files if file.is_file()]

    def molecules_sample_inputs(self, experiment: str, method: str, seed: str) -> dict[str, str]:
        """What the molecules of a run are drawn from: data, the pretrained model, or the run's own."""
        kind = self.kind_of(experiment, method)
        if kind == "data":
            return {"molecules": f"{self.config.results}/data/qm9.npz"}
        if kind == "pretrained":
            return {"model": self.shared_model(experiment)}
        return {"model": f"{self.run_folder(experiment, method, seed)}/model.safetensors"}

    # -------------------------------------------------------------------------------- on pictures

    def trained_for(self, model: str) -> str:
        """The first experiment that has a model: it says how the model is trained."""
        return next(
            name
            for name in self.of_kind(ImageExperiment)
            if image_experiment(self.experiments[name]).model.name == model
        )

    def image_model_file(self, name: str) -> str:
        """The file of an experiment's model, as it is named in the experiment's file or its overrides."""
        return f"config/models/{image_experiment(self.experiments[name]).model.name}.yaml"

    def image_model_inputs(self, experiment: str) -> Inputs:
        """What the check of a model waits for: its training, its fetching, or the shipped files."""
        case = image_experiment(self.experiments[experiment])
        if case.retrain:
            folder = f"{self.config.results}/models/{case.model.name}"
            return {part: f"{folder}/{part}/weights" for part in ("pipeline", "alignment")}
        sources = [case.model.pipeline, case.model.alignment, case.reward.weights]
        if any(source is not None and source.hub is not None for source in sources):
            return {"fetched": f"{self.config.results}/runs/{case.name}/pretrained/fetched.json"}
        shipped = [
            str(file)
            for source in (case.model.pipeline, case.model.alignment)
            for file in sorted(Path(source.path).rglob("*.*"))
            if file.is_file()
        ]
        return {"shipped": shipped} if shipped else {}

    def images_sample_inputs(self, experiment: str, method: str, seed: str) -> dict[str, str]:
        """The weights that the pictures of a run are drawn by, if they are not the pretrained model's."""
        if self.kind_of(experiment, method) == "pretrained":
            return {}
        return {"weights": f"{self.run_folder(experiment, method, seed)}/model.safetensors"}


@cache
def _digest(plan: Plan, stage: str, experiment: str, method: str | None) -> str:
    return stage_digest(plan.experiments[experiment], stage, method)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------ domains


class Domain(ABC):
    """What the files of experiments of one domain are.

    Args:
        plan: that they belong to.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def run_files(self, name: str) -> list[str]:
        """Files of all runs of an experiment."""

    @abstractmethod
    def figures(self, name: str) -> tuple[str, ...]:
        """Kinds of the figures of a file that is no study."""

    def read_by_table(self, name: str) -> list[str]:
        """What the table and the figure of a file are made from."""
        return self.plan.run_files(name, "metrics.json")


class Planar(Domain):
    """In the plane: a pretrained model and its density for each seed, rows solved on a grid."""

    def made(self, name: str, seed: int | str) -> list[str]:
        """Files of an experiment's runs of one seed, but for what is solved on the grid."""
        case = self.plan.experiments[name]
        base = self.plan.run_folder(case.base, "pretrained", seed)
        files = [f"{base}/model.safetensors", f"{base}/density.npz"]
        for method, settings in case.methods.items():
            files += _run(self.plan.run_folder(name, method, seed), settings, "samples.npz", "metrics.json")
        return files

    def run_files(self, name: str) -> list[str]:
        case = self.plan.experiments[name]
        files = []
        for seed in case.seeds:
            files += self.made(name, seed)
            if case.solved_apart:
                for rows in case.layers[1:]:
                    folder = self.plan.run_folder(name, rows, seed)
                    files += [f"{folder}/metrics.json", f"{folder}/laws.npz"]
            else:
                files += [f"{self.plan.run_folder(name, method, seed)}/laws.npz" for method in case.methods]
        return files

    def figures(self, name: str) -> tuple[str, ...]:
        if name in self.plan.files_of_kind(TailExperiment):
            return ("landscape", "densities", "histograms")
        return ("densities", "metrics")

    def read_by_table(self, name: str) -> list[str]:
        study = read_study(Path(experiment_file(name)))
        costs = study is not None and study.study.table == "solvers"
        return self.plan.run_files(name, "metrics.json", *(["history.csv"] if costs else []))


class Molecules(Domain):
    """Molecules: one pretrained model for all seeds, and one offline batch a seed for all methods."""

    def run_files(self, name: str) -> list[str]:
        case, base = self.plan.experiments[name], self.plan.shared_folder(name)
        made = ("samples.npz", "metrics.json", "molecules.sdf", "energies.npz")
        return [f"{base}/model.safetensors", f"{base}/training.json", *_runs(self.plan, case, *made)]

    def figures(self, name: str) -> tuple[str, ...]:
        return ("energies", "molecules")

    def read_by_table(self, name: str) -> list[str]:
        if name not in self.plan.studies:
            return super().read_by_table(name)
        compared = [file for case in self.plan.files[name].values() for file in self.compared(case)]
        return unique([*self.plan.run_files(name, "metrics.json", "history.csv"), *compared])

    def compared(self, case: AnyExperiment) -> list[str]:
        """Files that the table of a study of the level reads of the experiment that its cases derive from."""
        both = ["metrics.json", "history.csv"]
        made = {"pretrained": ["metrics.json"], "am": both}
        made |= dict.fromkeys(molecule_experiment(case).also, both)
        return [
            f"{self.plan.run_folder(case.base, method, seed)}/{file}"
            for seed in case.seeds
            for method, files in made.items()
            for file in files
        ]


class Images(Domain):
    """Pictures: one model for all seeds, and one offline batch a seed for all methods."""

    def run_files(self, name: str) -> list[str]:
        made = ("pictures", "metrics.json", "scores.npz")
        return [
            f"{self.plan.shared_folder(name)}/model.json",
            *_runs(self.plan, self.plan.experiments[name], *made),
        ]

    def figures(self, name: str) -> tuple[str, ...]:
        return ("pictures", "scores")


def _runs(plan: Plan, case: AnyExperiment, *made: str) -> list[str]:
    """Files of all runs of an experiment, each with those that are ``made`` of its samples."""
    return [
        file
        for seed in case.seeds
        for method, settings in case.methods.items()
        for file in _run(plan.run_folder(case.name, method, seed), settings, *made)
    ]


def _run(folder: str, settings: Any, *made: str) -> list[str]:
    """Files of one run: its threshold, its weights and what is made of its samples."""
    tuned = ["model.safetensors", "history.csv"] if settings.kind in ("am", "fdc", "tfft") else []
    threshold = ["threshold.json"] if settings.kind == "tfft" else []
    return [f"{folder}/{file}" for file in (*threshold, *tuned, *made)]


DOMAINS: Mapping[type, type[Domain]] = {
    Experiment: Planar,
    MoleculeExperiment: Molecules,
    ImageExperiment: Images,
}
"""Domains by the class of their experiments."""

PLANAR, TAIL, FUNCTIONAL = Experiment, TailExperiment, FunctionalExperiment
MOLECULES, IMAGES = MoleculeExperiment, ImageExperiment
