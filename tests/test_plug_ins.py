"""Modules of the user's own that fail: one error that says that it is theirs, where, and by which key."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from by_hand import Driven
from flowtilt.checkpoints import save_weights
from flowtilt.domains.planar import build
from flowtilt.domains.planar.build import build_model, build_reward
from flowtilt.domains.planar.experiment import tail_experiment
from flowtilt.domains.planar.landscapes import LANDSCAPES, Zones
from flowtilt.domains.planar.problems import check_problems
from flowtilt.functionals.registry import UTILITIES, Ingredients
from flowtilt.loading import imported
from flowtilt.pipeline import stages
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import Experiment
from flowtilt.rewards import Reward, RewardError
from small import tiny

KEY = "key reward.landscape: "
FAILURES = {
    "NameError": "no_such_name",
    "KeyError": "{}['absent']",
    "TypeError": "1 + 'one'",
    "AttributeError": "torch.no_such_attribute",
    "ImportError": "exec('from torch import no_such_name')",
    "ModuleNotFoundError": "__import__('no_such_package')",
    "ZeroDivisionError": "1 / 0",
    "RuntimeError": "torch.zeros(2) @ torch.zeros(3)",
    "AssertionError": "exec('assert False')",
    "SystemExit": "sys.exit(3)",
}
LANDSCAPE = """import sys
import torch
from flowtilt.domains.planar.landscapes import Stripes
{top}
class Own(Stripes):
    {body}
"""
ENTRY = """import torch
from flowtilt.functionals.registry import Entry
from flowtilt.functionals.utilities import ExpectedReward
class Own(ExpectedReward):
    {body}
OWN = Entry(Own, takes=("reward",))
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Writes a module of its own name, which it returns."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def module(text: str) -> str:
        name = f"own_{abs(hash((request.node.nodeid, len(made), text)))}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return name

    return module


@pytest.mark.parametrize("kind", FAILURES)
def test_a_module_that_fails_as_it_is_imported(kind: str, write) -> None:
    name = write(LANDSCAPE.format(top=FAILURES[kind], body="pass"))
    with pytest.raises(ConfigError, match=rf"^{KEY}.*{name}:Own.*fails.*{kind}.*{name}\.py, line 4\b"):
        build._imported(f"{name}:Own", LANDSCAPES, Zones)
    with pytest.raises(ValueError, match=rf"^utility {name}:Own: .*{kind}.*line 4\b"):
        UTILITIES.entry(f"{name}:Own")


def test_a_module_that_is_no_python_is_not_there_or_lacks_the_name(write) -> None:
    name = write("import torch\n\ndef broken(:\n")
    with pytest.raises(ConfigError, match=rf"^{KEY}.*{name}.*SyntaxError.*{name}\.py, line 3"):
        build._imported(f"{name}:Own", LANDSCAPES, Zones)
    with pytest.raises(ValueError, match=r"no_such_module.*PYTHONPATH"):
        imported("no_such_module:Own")
    with pytest.raises(ValueError, match=r"no_such_package.*PYTHONPATH"):
        imported("no_such_package.module:Own")
    name = write("x = 1\n")
    with pytest.raises(ValueError, match=f"{name}.*has no attribute 'Own'"):
        imported(f"{name}:Own")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def __init__(self): pass", "unexpected keyword"),
        ("def __init__(self, **k): raise KeyError('seven')", r"KeyError: 'seven'.*\.py, line 6"),
        ("def __init__(self, **k): no_such_name", r"NameError.*\.py, line 6"),
    ],
)
def test_a_class_that_cannot_be_made(body: str, words: str, write) -> None:
    name = write(LANDSCAPE.format(top="", body=body))
    experiment = tail_experiment(tiny(reward={"landscape": f"{name}:Own"}))
    with pytest.raises(ConfigError, match=f"{KEY}.*{name}:Own.*{words}"):
        build_reward(experiment)


def begun(path: Path, experiment: Experiment) -> Driven:
    """A results folder with an untrained model."""
    folder = Driven(path, experiment)
    save_weights(build_model(experiment), folder.file("pretrained", "model.safetensors"))
    return folder


@pytest.mark.parametrize("kind", [kind for kind in FAILURES if kind != "SystemExit"])
def test_a_reward_that_fails_in_a_job(
    kind: str,
    write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = f"def bumps(self, x):\n        return {FAILURES[kind]}"
    name = write(LANDSCAPE.format(top="", body=body))
    folder = begun(tmp_path, tiny(reward={"landscape": f"{name}:Own"}))
    with caplog.at_level(logging.DEBUG, "flowtilt"):
        assert folder.run("offline") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("offline: ")
    for word in (f"module {name}", kind, f"{name}.py, line 7", "mend it there"):
        assert word in line
    assert "Traceback" in caplog.text


def test_an_error_of_ours_is_not_blamed_on_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(stages, "sample_sde", broken)
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="ours"):
        begun(tmp_path, tiny()).run("offline")


@pytest.mark.parametrize("kind", ["NameError", "KeyError", "TypeError", "AttributeError", "RuntimeError"])
@pytest.mark.parametrize("method", ["__init__", "finite_value", "finite_variation"])
def test_a_functional_that_fails_before_any_job(method: str, kind: str, write) -> None:
    name = write(ENTRY.format(body=f"def {method}(self, *a, **k):\n        return {FAILURES[kind]}"))
    experiment = tiny("ot_2d", objective={"utility": {"kind": f"{name}:OWN"}})
    with pytest.raises(ConfigError, match=rf"key objective\.utility: .*{name}.*{kind}.*line 6"):
        check_problems(experiment)


def test_an_entry_that_does_not_fit_its_class(write) -> None:
    name = write(ENTRY.format(body="def __init__(self): pass"))
    with pytest.raises(ValueError, match=rf"utility {name}:OWN: .*unexpected keyword"):
        UTILITIES.build(f"{name}:OWN", {}, Ingredients(reward=build_reward(tail_experiment(tiny()))))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda x: None, "returned a NoneType"),
        (lambda x: x[:, 0].numpy(force=True), "returned a ndarray"),
        (lambda x: x[:, 0].to(torch.complex64), "type torch.complex64"),
        (lambda x: x, r"shape \(5, 2\)"),
        (lambda x: x.sum(), r"shape \(\)"),
    ],
)
def test_what_a_reward_returns(value, words: str) -> None:
    class Own(Reward):
        def value(self, x, context=None):
            return value(x)

    for look in (Own(), Own().gradient):
        with pytest.raises(RewardError, match=f"reward Own .*{words}.*must return"):
            look(torch.randn(5, 2))


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_and_truth_values_are_rewards_without_a_gradient(kind: torch.dtype) -> None:
    class Own(Reward):
        def value(self, x, context=None):
            return (10 * x[:, 0].abs()).to(kind)

    x = torch.randn(5, 2, dtype=torch.float64)
    rewards = Own()(x)
    assert rewards.dtype == x.dtype
    assert torch.equal(rewards, (10 * x[:, 0].abs()).to(kind).double())
    with pytest.raises(RewardError, match=rf"reward Own .*{kind}.*likelihood_ratio"):
        Own().gradient(x)
