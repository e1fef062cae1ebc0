"""A results folder driven by hand: the command line, one command a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowtilt.pipeline.cli import main
from flowtilt.pipeline.domain import Job, job_of
from flowtilt.pipeline.experiment import Experiment, dump


class Driven:
    """An experiment's files below a results folder, of the seed 0.

    Args:
        path: the results folder; the experiment's resolved file is put there.
        experiment: whose stages are run.
        options: of every command, such as ``workers``.
    """

    def __init__(self, path: Path, experiment: Experiment, **options: Any) -> None:
        self.path, self.config, self.options = path, path / "config.yaml", options
        path.mkdir(parents=True, exist_ok=True)
        self.use(experiment)

    def use(self, experiment: Experiment) -> None:
        """Go on with another configuration."""
        self.experiment: Any = experiment
        self.config.write_text(dump(experiment), encoding="utf-8")

    def words(self, stage: str, method: str = "", **options: Any) -> list[str]:
        """The command line of a stage."""
        words = [stage, str(self.config), "--results", str(self.path), "--seed", "0"]
        for name, value in {**({"method": method} if method else {}), **self.options, **options}.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def run(self, stage: str, method: str = "", **options: Any) -> int:
        """Run a stage by its command; the exit status."""
        return main(self.words(stage, method, **options))

    def job(self, stage: str, method: str = "") -> Job:
        """The job that a stage's command does."""
        return job_of(stage, [self.experiment], method, 0, self.path, self.options.get("workers"))[1]

    def file(self, method: str, name: str) -> Path:
        """A file of a method's run."""
        return self.path / "runs" / self.experiment.name / method / "seed0" / name

    def shared(self, name: str) -> Path:
        """A file of the pretrained model that all seeds start from."""
        return self.path / "runs" / self.experiment.base / "pretrained" / name
