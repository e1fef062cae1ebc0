"""A results folder driven by hand: the command line, one command a stage."""

from __future__ import annotations

import json
import shutil
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
        return self.path / "runs" / self.experiment.starts_from / "pretrained" / name


class Folder:
    """The files of an experiment's runs of seed 0; which ones a command reads and writes, it knows itself.

    Args:
        path: of all results; the experiment's file is ``config.yaml`` there.
        experiment: that is run.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self.experiment = path, experiment
        path.mkdir(parents=True, exist_ok=True)
        self.config = path / "config.yaml"
        self.write(experiment)
        self.base = self.folder("pretrained", experiment.starts_from)
        self.model = self.base / "model.safetensors"

    def write(self, experiment: Experiment) -> None:
        """Go on with another experiment."""
        self.config.write_text(dump(experiment))

    def folder(self, method: str, experiment: str | None = None) -> Path:
        return self.path / "runs" / (experiment or self.experiment.name) / method / "seed0"

    def file(self, method: str, name: str) -> Path:
        return self.folder(method) / name

    def run(self, stage: str, method: str = "") -> int:
        words = [stage, self.config, *(["--method", method] if method else [])]
        return main([*map(str, words), "--seed", "0", "--results", str(self.path)])

    def pretrain(self) -> None:
        """A pretrained model and its density."""
        assert self.run("pretrain") == 0
        assert self.run("density") == 0

    def finetune(self, method: str) -> int:
        """Fine-tune, with the offline batch before it if the method takes that."""
        _, job = job_of("finetune", [self.experiment], method, 0, self.path)
        if "offline" in job.inputs and not job.inputs["offline"].is_file():
            assert self.run("offline") == 0
        return self.run("finetune", method)

    def keep(self, method: str) -> int:
        """Keep samples, with the offline batch and the threshold before it if the method takes them."""
        of, batch = self.experiment.tilted_like(method), self.file("pretrained", "offline.npz")
        tail = self.experiment.methods[of].kind == "tfft" and not self.file(of, "threshold.json").exists()
        if (tail or self.experiment.methods[method].kind == "resampled") and not batch.exists():
            assert self.run("offline") == 0
        if tail:
            assert self.run("threshold", of) == 0
        return self.run("keep", method)

    def rows(self) -> dict[str, dict[str, float]]:
        """The networks' rows and the solved ones of all methods, measured in one go.

        A method that was not fine-tuned is measured as the pretrained model; its solved rows are its own. One
        that trains nothing keeps its samples here.
        """
        for method, config in self.experiment.methods.items():
            if config.tuned and not self.folder(method).exists():
                self.folder(method).mkdir(parents=True)
                shutil.copy(self.model, self.folder(method))
                self.file(method, "history.csv").write_text("update,active_share\n0,1.0\n")
        for method, config in self.experiment.methods.items():
            if config.keeps and not self.file(method, "kept.json").exists():
                assert self.keep(method) == 0
        assert self.run("measure") == 0
        rows: dict[str, dict[str, float]] = {}
        for method in self.experiment.methods:
            rows |= json.loads(self.file(method, "metrics.json").read_text())["rows"]
        return rows


def pretrained(path: Path, experiment: Experiment) -> Folder:
    """A folder with a pretrained model and its density."""
    folder = Folder(path, experiment)
    folder.pretrain()
    return folder
