"""The plan of a configuration: which experiments are run, the files of their runs, and what each job reads.

Plain functions of the validated configuration. The workflow's rules ask them, and unit tests call them in
milliseconds: neither Snakemake nor numpy nor torch is imported here. Paths are relative to the folder of the
run; those of files that it lacks are the workflow's own, and absolute. What a domain's runs consist of, its
stages say (:class:`flowtilt.pipeline.domain.Stage`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowtilt.pipeline.config import WorkflowConfig
from flowtilt.pipeline.domain import Domain, Run, domain_of
from flowtilt.pipeline.experiment import Experiment, dump, read_study
from flowtilt.pipeline.places import located
from flowtilt.pipeline.rules import StageRule, measures_resolution, stage_rules, unique
from flowtilt.pipeline.theory.config import TheoryConfig

Files = Mapping[str, Mapping[str, Experiment]]
"""Experiments by name, by the name of their file."""


def experiment_file(name: str) -> str:
    """The file of an experiment or a study: the user's, or else the workflow's own."""
    return str(located(f"config/experiments/{name}.yaml"))


def theory_file(name: str) -> str:
    """The file of a study of the theory; see :func:`experiment_file`."""
    return str(located(f"config/theory/{name}.yaml"))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a configuration stands for; :func:`flowtilt.pipeline.checks.read_plan` makes it.

    Attributes:
        theory: studies of the theory by name.
    """

    config: WorkflowConfig
    files: Files
    theory: Mapping[str, TheoryConfig]

    @cached_property
    def experiments(self) -> dict[str, Experiment]:
        """All experiments, cases of studies among them, by name."""
        return {name: experiment for cases in self.files.values() for name, experiment in cases.items()}

    @cached_property
    def domains(self) -> list[Domain]:
        """The domains that have experiments, in the order of their first one."""
        found = {experiment.domain: domain_of(experiment) for experiment in self.experiments.values()}
        return list(found.values())

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods of all experiments."""
        return sorted({method for experiment in self.experiments.values() for method in experiment.methods})

    @cached_property
    def rules(self) -> list[StageRule]:
        """The rules that run stages."""
        return stage_rules(self)

    def table_of(self, name: str) -> str | None:
        """The kind of the table of a study; None for an ordinary experiment."""
        study = read_study(Path(experiment_file(name)))
        return None if study is None else study.study.table

    def domain_of_file(self, name: str) -> Domain:
        """The domain of a file's experiments."""
        return domain_of(next(iter(self.files[name].values())))

    @cached_property
    def environments(self) -> list[str]:
        """The environments of all jobs: that of tables and pages, and the domains' own."""
        return unique(["core", *(domain.environment for domain in self.domains)])

    def environment(self, name: str) -> str:
        """The environment that the figures of a file are drawn in."""
        return self.domain_of_file(name).environment

    @cached_property
    def config_files(self) -> dict[str, str]:
        """The resolved configuration that the jobs of each experiment read, at its content's address."""
        return {
            name: f"{self.config.results}/configs/{name}/{_hash(one.model_dump(mode='json'))[:16]}.yaml"
            for name, one in self.experiments.items()
        }

    def resolved(self, experiment: str) -> str:
        """The text of an experiment's resolved configuration."""
        return dump(self.experiments[experiment])

    def config_hash(self) -> str:
        """Hash of all that is configured: the experiments, and which of them are run."""
        chosen = {key: getattr(self.config, key) for key in ("experiments", "resolution")}
        experiments = {name: one.model_dump(mode="json") for name, one in self.experiments.items()}
        return _hash([chosen, experiments, {name: study.model_dump() for name, study in self.theory.items()}])

    def file_digest(self, name: str) -> str:
        """Hash of the experiments of a file: its table and figures are made again when it changes."""
        return _hash({case: one.model_dump(mode="json") for case, one in self.files[name].items()})[:16]

    @cached_property
    def overrides(self) -> str:
        """What is merged into experiments, as the command line takes it."""
        return json.dumps(self.config.changes, sort_keys=True)

    def theory_overrides(self, theory: str) -> str:
        """What is merged into a study of the theory, as the command line takes it."""
        return json.dumps(self.config.theory_overrides.get(theory, {}), sort_keys=True)

    def runs_of(self, experiment: Experiment) -> Iterator[Run]:
        """All runs of an experiment."""
        for seed in experiment.seeds:
            for method in experiment.methods:
                yield Run(self.config.results, experiment, method, seed)

    def run_files(self, name: str, *kinds: str) -> list[str]:
        """Files of all runs that the table and the figures of an experiment file rest on.

        Args:
            kinds: names of files, such as ``metrics.json``; all if none is given.
        """
        files = unique(file for experiment in self.files[name].values() for file in self._written(experiment))
        return [file for file in files if not kinds or Path(file).name in kinds]

    def _written(self, experiment: Experiment) -> Iterator[str]:
        """What the stages of an experiment write, and those of what it starts from."""
        for stage in domain_of(experiment).stages:
            if not stage.wanted or stage.scope == "resolution":
                continue
            for seed in experiment.seeds:
                for method in experiment.methods if stage.kinds else [""]:
                    if stage.has(experiment, method):
                        yield from stage.written(Run(self.config.results, experiment, method, seed)).values()

    def read_by_table(self, name: str) -> list[str]:
        """What the table of a file is made from: metrics, and what its domain adds to them."""
        domain, table = self.domain_of_file(name), self.table_of(name)
        return unique(
            file
            for experiment in self.files[name].values()
            for run in self.runs_of(experiment)
            for file in [*self._metrics(run), *domain.read_by_table(run, table)]
        )

    def _metrics(self, run: Run) -> list[str]:
        """Metrics of a run and of the rows that are solved beside it."""
        solved = run.experiment.solutions[1:] if run.experiment.solved_apart else ()
        return [run.file("metrics.json"), *(run.file_of(solution, "metrics.json") for solution in solved)]

    def read_by_figures(self, name: str) -> list[str]:
        """What the figures of a file are drawn from: all of its runs, and what its table is made from."""
        return unique([*self.run_files(name), *self.read_by_table(name), *self._resolution])

    @property
    def _resolution(self) -> list[str]:
        """The measured resolution of networks, if a domain measures it."""
        wanted = any(measures_resolution(self.domain_of_file(name)) for name in self.config.experiments)
        return [f"{self.config.results}/resolution.json"] if wanted else []

    def tables_of(self, name: str) -> list[str]:
        """The table of a file, in each of its forms."""
        return [f"{self.config.results}/tables/{name}.{extension}" for extension in ("csv", "md", "tex")]

    def captions(self, name: str) -> Mapping[str, str]:
        """What the figures of a file show, by their endings."""
        return self.domain_of_file(name).figures(list(self.files[name].values()), self.table_of(name))

    def caption_file(self, name: str, shows: str) -> str:
        """The caption of a figure in the report: its domain's own, or one that fits any figure."""
        folder = self.domain_of_file(name).captions
        return f"{folder}/{shows}.rst" if folder else "../report/figure.rst"

    def figures_of(self, name: str) -> list[str]:
        """Figures of an experiment file."""
        return [f"{self.config.results}/figures/{name}{ending}.png" for ending in self.captions(name)]

    def for_all(self, files_of: Callable[[str], list[str]]) -> list[str]:
        """The files of all experiment files that are run, each once."""
        return unique(file for name in self.config.experiments for file in files_of(name))

    @cached_property
    def runs(self) -> list[str]:
        """Files of all runs. Targets ask for them too: Snakemake otherwise takes tables that are there, as in
        a fresh clone, for a sign that nothing is left to do."""
        theory = [f"{self.config.results}/theory/{name}.json" for name in self.theory]
        return [*self.for_all(self.run_files), *self._resolution, *theory]

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
        """What all pretrained models consist of."""
        return unique(
            file
            for name in self.config.experiments
            for file in self.run_files(name, "model.safetensors", "model.json")
            if "/pretrained/" in file
        )

    @cached_property
    def theories(self) -> list[str]:
        """All that is made of the theory."""
        names = {f"theory_{name}" for name in self.theory}
        found = [file for file in (*self.tables, *self.figures) if Path(file).stem in names]
        return [*found, *(f"{self.config.results}/theory/{name}.json" for name in self.theory)]


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
