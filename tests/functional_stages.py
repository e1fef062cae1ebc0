"""The stages of an experiment on functionals, one command after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowtilt.cli import main
from flowtilt.experiment import Experiment, dump


class Folder:
    """A results folder driven by hand, one command a stage."""

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self.experiment = path, experiment
        self.config = path / "config.yaml"
        self.config.write_text(dump(experiment))
        assert self.run("pretrain", seed=0, output="pre.safetensors", history="pre.csv") == 0
        assert self.run("density", model="pre.safetensors", output="density.npz") == 0

    def file(self, name: str) -> Path:
        return self.path / name

    def run(self, stage: str, **options: Any) -> int:
        words = [stage, str(self.config)]
        for name, value in options.items():
            text = str(self.file(value)) if isinstance(value, str) and "." in value[-12:] else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        return main(words)

    def finetune(self, method: str) -> int:
        self.run("sample", method="pretrained", seed=0, model="pre.safetensors", output="pre.npz")
        return self.run(
            "finetune",
            method=method,
            seed=0,
            pretrained="pre.safetensors",
            output="m.safetensors",
            history="m.csv",
        )

    def row(self, method: str, **more: str) -> dict[str, float]:
        model = "pre.safetensors" if method == "pretrained" else "m.safetensors"
        assert self.run("sample", method=method, seed=0, model=model, output="m.npz") == 0
        options = {"model": model, "samples": "m.npz", "density": "density.npz", "output": "m.json"}
        assert self.run("measure", method=method, seed=0, **options, **more) == 0
        return json.loads(self.file("m.json").read_text())["rows"][method]

    def solve(self) -> dict[str, dict[str, float]]:
        files = {"output": "e.json", "laws": "e.npz", "optimum_output": "o.json", "optimum_laws": "o.npz"}
        assert self.run("solve", density="density.npz", **files) == 0
        return {
            name: row
            for file in ("e.json", "o.json")
            for name, row in json.loads(self.file(file).read_text())["rows"].items()
        }
