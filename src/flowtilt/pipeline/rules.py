"""The rules of the workflow that run stages: one for each stage of each domain that the configuration needs.

Plain data and functions of the plan; ``workflow/rules/run.smk`` has one rule that asks them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flowtilt.pipeline.domain import Domain, Run, Stage
from flowtilt.pipeline.experiment import Experiment, stage_digest

if TYPE_CHECKING:
    from flowtilt.pipeline.plan import Plan

_FIELD = re.compile(r"\{(\w+)\}")


def unique(files: Iterable[str]) -> list[str]:
    """The files in their order, each once."""
    return list(dict.fromkeys(files))


@dataclass(frozen=True, eq=False)
class StageRule:
    """The jobs of one stage of a domain; of a stage that measures whole files, those of one file.

    Attributes:
        file: that they are of; empty for a stage whose jobs are of one run each.
    """

    plan: Plan
    domain: Domain
    stage: Stage
    experiments: list[Experiment]
    file: str = ""

    @property
    def name(self) -> str:
        """Of the rule."""
        own = rule_name(self.domain, self.stage)
        return f"{own}_{self.file}" if self.file else own

    @property
    def results(self) -> str:
        return self.plan.config.results

    @property
    def whole(self) -> bool:
        """Whether a job is of several experiments."""
        return self.stage.scope != "run"

    @cached_property
    def outputs(self) -> dict[str, str | list[str]]:
        """What a job writes, by role: patterns with wildcards in braces."""
        if self.stage.scope == "file":
            every = [self.stage.written(run) for run in self._runs("{seed}")]
            return {role: unique(files[role] for files in every) for role in self.stage.writes}
        return {role: f"{self.results}/{pattern}" for role, pattern in self.stage.writes.items()}

    @cached_property
    def wildcards(self) -> list[str]:
        """Those of a job, in the order in which files and logs have them."""
        if self.stage.scope == "file":
            return ["seed"]
        return unique(field for pattern in self.stage.writes.values() for field in _FIELD.findall(pattern))

    @cached_property
    def constraints(self) -> dict[str, str]:
        """What wildcards can be, as regular expressions."""
        allowed: dict[str, list[str]] = {}
        for experiment in self.experiments:
            places = {"experiment": experiment.name, **self.stage.fields(experiment)}
            for field, value in places.items():
                allowed.setdefault(field, []).append(value)
            allowed.setdefault("method", []).extend(
                method for method in experiment.methods if self.stage.has(experiment, method)
            )
        return {
            field: "|".join(re.escape(value) for value in unique(allowed[field])) or "(?!)"
            for field in self.wildcards
            if field in allowed
        }

    def inputs(self, **wildcards: str) -> dict[str, str | list[str]]:
        """What a job reads, by role."""
        if not self.whole:
            return dict(self.stage.reads(self.run(**wildcards)))
        seed = wildcards.get("seed", "")
        runs = (
            self._runs(seed)
            if self.stage.scope == "file"
            else [Run(self.results, one) for one in self.experiments]
        )
        files = [file for run in runs for value in self.stage.reads(run).values() for file in _listed(value)]
        return {"runs": unique(files)}

    def run(self, **wildcards: str) -> Run:
        """The run that a job is of."""
        experiment = next(one for one in self.experiments if self._is_of(one, wildcards))
        return Run(self.results, experiment, wildcards.get("method", ""), wildcards.get("seed", ""))

    def _is_of(self, experiment: Experiment, wildcards: dict[str, str]) -> bool:
        places = {"experiment": experiment.name, **self.stage.fields(experiment)}
        return all(places[field] == value for field, value in wildcards.items() if field in places)

    def _runs(self, seed: str) -> Iterator[Run]:
        """All runs that a job is of, for one seed."""
        for experiment in self.experiments:
            for method in experiment.methods:
                if self.stage.has(experiment, method):
                    yield Run(self.results, experiment, method, seed)

    def log(self) -> str:
        """Path of log and benchmark below the rule's folder, without its ending."""
        parts = [self.file] if self.file else []
        parts += [f"seed{{{field}}}" if field == "seed" else f"{{{field}}}" for field in self.wildcards]
        return "/".join(parts or [self.stage.name])

    def _of(self, wildcards: dict[str, str]) -> list[Experiment]:
        return self.experiments if self.whole else [self.run(**wildcards).experiment]

    def digest(self, **wildcards: str) -> list[str]:
        """Hashes of what a job reads of its experiments: it runs again when one changes."""
        method = wildcards.get("method")
        return [stage_digest(experiment, self.stage.name, method) for experiment in self._of(wildcards)]

    def command(self, threads: int = 1, output: str = "", **wildcards: str) -> str:
        """The shell command of a job, quoted; its configuration is at its content's address.

        Args:
            output: its first output, if that may lie in another folder than the plan says.
        """
        results = self.results
        if output:
            planned = next(file for files in self.outputs.values() for file in _listed(files))
            results = output.removesuffix(planned.format(**wildcards)) + results
        config, needs = self.plan.config, self.stage.needs
        each = max(1, threads // needs.processes(config))
        words = ["flowtilt", self.stage.name]
        words += [self.plan.config_files[experiment.name] for experiment in self._of(wildcards)]
        for option in ("method", "seed"):
            if option in wildcards:
                words += [f"--{option}", wildcards[option]]
        words += ["--results", results, "--workers", str(each)]
        if needs.gpu and config.gpu:
            words += ["--gpu", str(config.gpu)]
        together = []
        if needs.processes(config) > 1:
            number = str(needs.processes(config))
            together = ["torchrun", "--standalone", "--nproc-per-node", number, "--no-python"]
        return f"OMP_NUM_THREADS={each if needs.threaded else 1} {shlex.join([*together, *words])}"


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def rule_name(domain: Domain, stage: Stage) -> str:
    """Name of the rule of a domain's stage, and of its folder of logs and benchmarks."""
    return f"{domain.name}_{stage.name}".replace("-", "_")


def benchmark_of(domain: Domain, stage: Stage, run: Run) -> str:
    """Path of a run's benchmark below the folder of benchmarks, without its ending."""
    file = run.experiment.name.partition("/")[0]
    if stage.scope == "file":
        return f"{rule_name(domain, stage)}_{file}/{file}/seed{run.seed}"
    experiment = stage.folder_of(run.experiment)
    places = {"experiment": experiment, "method": run.method, "seed": f"seed{run.seed}"}
    places |= stage.fields(run.experiment)
    fields = unique(field for pattern in stage.writes.values() for field in _FIELD.findall(pattern))
    return "/".join([rule_name(domain, stage), *([places[field] for field in fields] or [stage.name])])


def measures_resolution(domain: Domain) -> bool:
    """Whether rows of a domain are at the resolution that its networks are measured to have."""
    return any(stage.scope == "resolution" for stage in domain.stages)


def stage_rules(plan: Plan) -> list[StageRule]:
    """All rules that a plan needs, in the order of domains and stages."""
    rules = []
    for domain in plan.domains:
        own = [one for one in plan.experiments.values() if one.domain == domain.name]
        for stage in domain.stages:
            served = [one for one in own if stage.of(one) and stage.folder_of(one) == one.name]
            if stage.scope == "file":
                for name, cases in plan.files.items():
                    if found := [case for case in cases.values() if case in served]:
                        rules.append(StageRule(plan, domain, stage, found, name))
                continue
            if stage.scope == "resolution":
                study = plan.files.get(plan.config.resolution or "", {})
                served = [case for case in study.values() if case in served]
            if served:
                rules.append(StageRule(plan, domain, stage, served))
    return rules
