"""What a domain brings to the pipeline, and how domains are found.

A domain is what experiments are on: anything that a flow draws. It is one object
with the attributes of :class:`Domain`, in a package of its own. Those in :mod:`flowtilt.domains` are there; a
package of somebody else brings one by an entry point of the group ``flowtilt.domains``::

    [project.entry-points."flowtilt.domains"]
    circle = "circle_domain:DOMAIN"

:class:`flowtilt.pipeline.usual.BaseDomain` has defaults; ``tests/toy_domain`` is an example of a whole one.
A workflow is planned with domains: importing one takes neither torch nor the numerics. What its jobs need is
named by ``module:function`` and imported by them.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from flowtilt.pipeline.configuration import ConfigError, Section
from flowtilt.pipeline.resources import Needs
from flowtilt.pipeline.sections import KEPT

if TYPE_CHECKING:
    from flowtilt.pipeline.experiment import Experiment
    from flowtilt.pipeline.report.panels import Description

log = logging.getLogger(__name__)

GROUP = "flowtilt.domains"
"""The group of entry points, and the package that holds the domains of flowtilt itself."""

Files = Mapping[str, "str | list[str]"]
"""Files by the role that they have in a job."""


@dataclass(frozen=True)
class Run:
    """A method of an experiment for one seed, and where its files are.

    Attributes:
        results: root of all results.
        experiment: of the run.
        method: of it; empty in a stage that is of no method.
        seed: of the run, or a field ``{seed}`` to be filled in; empty in a stage that is of no seed.
    """

    results: str
    experiment: Experiment
    method: str = ""
    seed: int | str = ""

    @property
    def kind(self) -> str:
        """The kind of its method."""
        return self.experiment.methods[self.method].kind

    def file(self, name: str) -> str:
        """A file of the run itself."""
        return self.file_of(self.method, name)

    def file_of(self, method: str, name: str, experiment: str | None = None) -> str:
        """A file of another method's run, of this experiment or of another one."""
        return f"{self.results}/runs/{experiment or self.experiment.name}/{method}/seed{self.seed}/{name}"

    def pretrained(self, name: str) -> str:
        """A file of the pretrained model of the run's seed, in the experiment that its own derives from."""
        return self.file_of("pretrained", name, self.experiment.starts_from)

    def shared(self, name: str) -> str:
        """A file that the runs of all seeds start from."""
        return f"{self.results}/runs/{self.experiment.starts_from}/pretrained/{name}"

    def taken(self) -> dict[str, str]:
        """The threshold that a fine-tuning of kind tfft takes."""
        return {"threshold": self.file("threshold.json")} if self.kind == "tfft" else {}

    def tilted_by(self) -> dict[str, str]:
        """The threshold of the method of kind tfft whose tilt one that trains nothing takes."""
        of = self.experiment.tilted_like(self.method)
        found = self.experiment.methods[of].kind == "tfft"
        return {"threshold": self.file_of(of, "threshold.json")} if found else {}

    def trained(self) -> dict[str, str]:
        """What a fine-tuning leaves beside its weights: its history, and the threshold that it took; of a
        method that trains nothing, what its samples cost."""
        tuned = self.experiment.methods[self.method].tuned
        kept = {"kept": self.file("kept.json")} if self.kind in KEPT else {}
        return ({"history": self.file("history.csv")} if tuned else {}) | self.taken() | kept

    def drawn(self, name: str) -> str:
        """The samples that a run is measured by; of a method that trains nothing, those that it has kept."""
        return self.file(f"kept_{name}" if self.kind in KEPT else name)

    def reference(self, name: str) -> dict[str, str]:
        """A file of the evaluated pretrained model, which a run's predicted tilt is taken from."""
        compared = self.kind in ("am", "tfft") and "pretrained" in self.experiment.methods
        return {"reference": self.file_of("pretrained", name)} if compared else {}


@dataclass(frozen=True)
class Stage:
    """One kind of job: a subcommand of ``flowtilt``, and in the workflow a rule of each domain that has it.

    Attributes:
        name: of the subcommand.
        action: ``module:function`` that does it, called with a :class:`Job`.
        writes: files by their role, as patterns below the results with the fields ``experiment``, ``method``
            and ``seed``, and those of ``fields``.
        reads: files by their role that a job waits for, of its run.
        sections: keys of the experiment that it reads: its jobs run again when one of them changes.
        kinds: of methods that it has jobs of; none if it is of no method.
        of: experiments that it is for.
        needs: what its jobs ask for.
        fields: other fields of ``writes``, from the experiment.
        folders: roles that are folders.
        networks: whether it runs networks though it takes no GPU.
        scope: whether a job is of one ``run``; of all experiments of a ``file`` together, for one seed; or of
            the file that the configuration's key ``resolution`` names, for all seeds.
        wanted: whether what it writes is asked for by itself, and not only where another stage reads it.
        before: whether it is done once for all experiments that derive from one, in that one's folder.
        priority: among the jobs that could start.
    """

    name: str
    action: str
    writes: Mapping[str, str]
    reads: Callable[[Run], Files]
    sections: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    of: Callable[[Experiment], bool] = lambda experiment: True
    needs: Needs = field(default_factory=lambda: Needs((1500, 8000), (30, 120)))
    fields: Callable[[Experiment], Mapping[str, str]] = lambda experiment: {}
    folders: tuple[str, ...] = ()
    networks: bool = False
    scope: Literal["run", "file", "resolution"] = "run"
    wanted: bool = True
    before: bool = False
    priority: int = 0

    def has(self, experiment: Experiment, method: str) -> bool:
        """Whether there is a job of a method; the empty name stands for none."""
        if not self.of(experiment) or bool(self.kinds) != bool(method):
            return False
        return not method or experiment.methods[method].kind in self.kinds

    def folder_of(self, experiment: Experiment) -> str:
        """The experiment whose folder a job writes to."""
        return experiment.starts_from if self.before else experiment.name

    def written(self, run: Run) -> dict[str, str]:
        """The files of a run's job by their role."""
        own = {"experiment": self.folder_of(run.experiment), "method": run.method, "seed": run.seed}
        return {
            role: f"{run.results}/{pattern.format(**own, **self.fields(run.experiment))}"
            for role, pattern in self.writes.items()
        }


@dataclass(frozen=True)
class Job:
    """What a stage's function is called with.

    Attributes:
        run: that it is of; of a job on several experiments, the first one's.
        experiments: that it is of.
        inputs: files to read by their role.
        outputs: files to write by their role.
        workers: processes that it may use beside its own.
        bar: makes what shows the progress of a training, from the number of its updates and a label.
    """

    run: Run
    experiments: Sequence[Any]
    inputs: Mapping[str, Path | list[Path]]
    outputs: Mapping[str, Path]
    workers: int | None = None
    bar: Callable[[int, str], Callable[[dict[str, float]], None] | None] = lambda total, label: None

    @property
    def results(self) -> Path:
        """Root of all results."""
        return Path(self.run.results)

    @property
    def experiment(self) -> Any:
        """The experiment that the job is of."""
        return self.run.experiment

    @property
    def method(self) -> str:
        return self.run.method

    @property
    def seed(self) -> int:
        return int(self.run.seed)

    def read(self, role: str) -> Path:
        """An input that the stage must have."""
        found = self.inputs[role]
        assert isinstance(found, Path), role
        return found

    def read_if_any(self, role: str) -> Path | None:
        """An input that only some runs have."""
        return self.read(role) if role in self.inputs else None


class Chapter(NamedTuple):
    """What the reference of the configuration says of one kind of file.

    Attributes:
        title: of the chapter.
        text: its introduction.
        kind: what the file's keys are.
        of: how its sections are told apart from those of the same name in other chapters.
        functionals: whether the utilities and divergences of the registry are listed under it.
    """

    title: str
    text: str
    kind: type[Section]
    of: str
    functionals: bool = False


class Domain(Protocol):
    """What the pipeline asks of a domain."""

    name: str
    """As experiments name it by their key ``domain``."""

    words: str
    """Where its experiments are, in a sentence: ``on a circle``."""

    environment: str
    """Software of its jobs: a file of ``envs/`` without its ending."""

    packages: tuple[str, ...]
    """Packages whose versions belong in the record of a run, beside those of flowtilt itself."""

    stages: Sequence[Stage]
    """Its jobs, from pretraining to metrics."""

    verify: str
    """``module:function`` that refuses an experiment that no job could use, for what takes torch to be told;
    it is called as a run begins. Empty if there is nothing to check."""

    workbench: str
    """``module:function`` from a :class:`Job` to a :class:`flowtilt.pipeline.stages.Workbench`."""

    process: str
    """``module:function`` from an experiment and a number of steps to the path of its solver, its times, and
    the data variance of its steps, for :func:`flowtilt.control.discretisation.discretisation_bias`."""

    report: str
    """``module:object`` with the functions of :class:`flowtilt.pipeline.report.base.Report`."""

    captions: str
    """Folder with a caption ``{what is shown}.rst`` of each figure, for Snakemake's report, where
    ``snakemake.params.name`` is the name of the file of experiments; empty for one that fits any figure."""

    chapters: Sequence[Chapter]
    """What the reference of the configuration says of its experiments."""

    assessment: tuple[str, ...]
    """Stages between a run's model and its metrics, whose times the table of costs adds up."""

    def schema(self, data: Mapping[str, Any]) -> type[Experiment]:
        """The class that checks an experiment's data."""

    def completed(self, data: Mapping[str, Any], file: Path) -> dict[str, Any]:
        """The data with what other files hold, such as that of a named model.

        Raises:
            ConfigError: if such a file is missing.
        """

    def check(self, files: Mapping[str, Mapping[str, Experiment]]) -> None:
        """Refuse experiments of the domain that cannot be run beside each other.

        Args:
            files: all that are needed, by the names of experiment and file.

        Raises:
            ConfigError: naming file, key and fix.
        """

    def figures(self, experiments: Sequence[Experiment], table: str | None) -> Mapping[str, str]:
        """Figures of a file: what each shows, in a word, by what follows the file's name.

        Args:
            experiments: of the file.
            table: of a study; None for an ordinary experiment.
        """

    def read_by_table(self, run: Run, table: str | None) -> list[str]:
        """What the table of a file is made from, of one run; beside that of others if need be."""

    def describe(self, metric: str) -> Description | None:
        """Words and unit of one of its own metrics."""


# -------------------------------------------------------------------------------- the registry


class DomainError(ConfigError):
    """A domain that cannot be used; the message names its package and the cure."""


@cache
def sources() -> Mapping[str, EntryPoint]:
    """Where each known domain comes from, by name.

    Raises:
        DomainError: if two packages bring one of the same name.
    """
    own = importlib.import_module(GROUP)
    found = {
        name: EntryPoint(name, f"{GROUP}.{name}:DOMAIN", GROUP)
        for _, name, package in pkgutil.iter_modules(own.__path__)
        if package
    }
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise DomainError(
                f"two packages bring a domain {point.name!r}: {other.value}{_package_of(other)} and "
                f"{point.value}{_package_of(point)}; uninstall one of them"
            )
    return found


def _package_of(point: EntryPoint) -> str:
    return f" (package {point.dist.name})" if point.dist is not None else ""


@cache
def domain_named(name: str) -> Domain:
    """A domain by its name.

    Raises:
        DomainError: if there is none, or it cannot be used.
    """
    if name not in sources():
        raise DomainError(
            f"unknown domain {name!r}; known here: {', '.join(sorted(sources()))}. Another is "
            "there once the package that brings it is installed beside flowtilt"
        )
    point = sources()[name]
    what = f"domain {name!r}{_package_of(point)}, {point.value}"
    try:
        domain: Domain = point.load()
    except (Exception, SystemExit) as error:  # of somebody else's module, anything
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise DomainError(f"{what}: cannot be imported ({said}); mend its package, or uninstall it") from None
    if isinstance(domain, type) or not hasattr(domain, "name"):
        raise DomainError(
            f"{what}: is {domain!r}, not a domain; name an object with the attributes of "
            "flowtilt.pipeline.domain.Domain in the entry point"
        )
    members = [*Domain.__annotations__, *(own for own in vars(Domain) if not own.startswith("_"))]
    if lacking := [member for member in members if not hasattr(domain, member)]:
        raise DomainError(
            f"{what}: lacks {', '.join(lacking)}, which flowtilt.pipeline.domain.Domain says a domain has; "
            "add them, or install versions of both packages that fit"
        )
    if domain.name != name:
        raise DomainError(f"{what}: calls itself {domain.name!r}; give both the same name")
    return domain


def domain_of(experiment: Experiment) -> Domain:
    """The domain of an experiment."""
    return domain_named(experiment.domain)


def known_domains() -> list[Domain]:
    """All domains that can be used; one that cannot is named when an experiment asks for it."""
    found = []
    for name in sources():
        try:
            found.append(domain_named(name))
        except DomainError as error:
            log.debug("%s", error)
    return found


def job_of(
    stage: str,
    experiments: Sequence[Experiment],
    method: str,
    seed: int | None,
    results: Path,
    workers: int | None = None,
) -> tuple[Stage, Job]:
    """A job of a stage, with the files that it reads and writes.

    Args:
        stage: name of it.
        experiments: that it is of; but for stages that take whole files, one.
        method: of the run; empty for stages that are of no method.
        seed: of the run; None for stages that are of no seed.
        results: root of the results.
        workers: see :class:`Job`.

    Raises:
        ConfigError: if the domain has no such stage, or none of the experiment's kind or method.
    """
    first = experiments[0]
    domain = domain_of(first)
    named = [one for one in domain.stages if one.name == stage]
    if not named:
        own = ", ".join(dict.fromkeys(one.name for one in domain.stages))
        raise ConfigError(f"experiment {first.name}: {domain.name} has no stage {stage}; it has {own}")
    found = next((one for one in named if one.of(first)), None)
    if found is None:
        raise ConfigError(f"experiment {first.name}: the stage {stage} is not for experiments of its kind")
    run = Run(str(results), first, method, "" if seed is None else seed)
    if found.scope != "run":  # of several experiments; what it writes is known where that is one file
        outputs = {role: results / file for role, file in found.writes.items() if "{" not in file}
        return found, Job(run, experiments, {}, outputs, workers)
    _check_run(found, run)
    return found, run_job(found, run, workers)


def run_job(stage: Stage, run: Run, workers: int | None = None) -> Job:
    """The job of a stage on one run."""
    inputs = {
        role: Path(value) if isinstance(value, str) else [Path(file) for file in value]
        for role, value in stage.reads(run).items()
    }
    outputs = {role: Path(file) for role, file in stage.written(run).items()}
    return Job(run, [run.experiment], inputs, outputs, workers)


def _check_run(stage: Stage, run: Run) -> None:
    """Refuse a run that a stage has no job of."""
    experiment, methods = run.experiment, run.experiment.methods
    if stage.kinds:
        known = ", ".join(name for name in methods if stage.has(experiment, name))
        if not run.method:
            raise ConfigError(
                f"experiment {experiment.name}: the stage {stage.name} is of a method; give it --method, one "
                f"of: {known}"
            )
        if run.method not in methods:
            raise ConfigError(f"experiment {experiment.name}: unknown method {run.method!r}; it has {known}")
        if not stage.has(experiment, run.method):
            raise ConfigError(
                f"experiment {experiment.name}: method {run.method!r} has no {stage.name}; those that have: "
                f"{known or 'none'}"
            )
    if any("{seed}" in pattern for pattern in stage.writes.values()) and run.seed == "":
        raise ConfigError(f"the stage {stage.name} is of a seed; give it --seed")


def imported(action: str) -> Any:
    """What ``module:object`` names, of a domain."""
    module, _, name = action.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded
