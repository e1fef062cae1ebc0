"""What TFFT's protocol for Stable Diffusion asks: prompts of files, their dropout, the schedule's end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.model import LatentFlow
from flowtilt.domains.images.prompts import read_prompts
from flowtilt.domains.images.schedule import process, stable_diffusion
from flowtilt.domains.images.sections import GuidanceConfig
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.experiment import dump, load_file, load_resolved, stage_digest
from flowtilt.rewards import Reward
from small import CONFIG

LEFT_TAIL = CONFIG / "experiments" / "text_to_image_left_tail.yaml"


def load(**changes: Any) -> ImageExperiment:
    (experiment,) = load_file(LEFT_TAIL, {"images": changes}).values()
    assert isinstance(experiment, ImageExperiment)
    return experiment


# --- Prompts of a file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.txt", "\ufeffa red fox\n\n  a stone arch  \na red fox\n"),
        ("list.json", '["a red fox", "a stone arch"]'),
        ("benchmark_ir.json", '[{"id": 1, "prompt": "a red fox"}, {"id": 2, "prompt": "a stone arch"}]'),
        ("refl_data.json", '[{"image_path": "x.png", "text": "a red fox"}, {"text": "a stone arch"}]'),
        ("lines.jsonl", '{"prompt": "a red fox"}\n{"prompt": "a stone arch"}\n'),
    ],
)
def test_a_file_of_prompts_stands_for_their_list(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert read_prompts(str(file), "here") == ["a red fox", "a stone arch"]
    experiment = load(prompts=str(file))
    assert experiment.prompts == experiment.trained_prompts == ["a red fox", "a stone arch"]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(experiment))
    file.unlink()  # jobs need the file no more
    assert load_resolved(resolved) == experiment


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("absent.json", None, "no such file"),
        ("folder", None, "no such file"),
        ("broken.json", '["a red fox"', "cannot be read as prompts"),
        ("other.json", '{"prompt": "a red fox"}', "it holds a dict of JSON, not a list"),
        ("empty.json", "[]", "has no prompts"),
        ("empty.txt", "\n \n", "has no prompts"),
        ("numbers.json", '["a red fox", 3]', "entry 2 is no prompt"),
        ("objects.json", '[{"caption": "a red fox"}]', "entry 1 is no prompt"),
        ("blank.json", '["a red fox", " "]', "entry 2 is no prompt"),
    ],
)
@pytest.mark.parametrize("key", ["prompts", "training_prompts"])
def test_a_file_that_has_no_prompts_is_refused_when_the_run_is_planned(
    key: str, name: str, text: str | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if name == "folder":
        file.mkdir()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(**{key: str(file)})
    message = str(error.value)
    assert all(part in message for part in (f"key {key}: ", str(file), said, "text_to_image_left_tail.yaml"))
    assert any(fix in message for fix in ("place one there", "give a text"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"key prompts: .*cannot be read as prompts"):
        load(prompts=str(file))


def test_ten_thousand_prompts_are_a_training_list_apart_from_the_measured_ones(tmp_path: Path) -> None:
    """Of the stages, those that train and the offline batch depend on it, and no other."""
    file = tmp_path / "refl_data.json"
    file.write_text(json.dumps([{"text": f"wish number {k}"} for k in range(10_000)]))
    plain, apart = load(), load(training_prompts=str(file))
    assert len(apart.trained_prompts) == 10_000
    assert apart.prompts == plain.prompts
    changed = {
        stage
        for stage in ("model", "offline", "threshold", "finetune", "sample", "evaluate")
        if stage_digest(plain, stage) != stage_digest(apart, stage)
    }
    assert changed == {"offline", "finetune"}


# --- The schedule -------------------------------------------------------------------------------


def test_the_last_level_is_moved_half_way_to_one() -> None:
    """With a first variance of 0.002 the last step leads to the level (0.998 + 1) / 2 = 0.999."""
    path = stable_diffusion((0.002, 0.009), end=0.5)
    betas = np.linspace(0.002**0.5, 0.009**0.5, 1000) ** 2
    np.testing.assert_allclose(path.levels, np.cumprod(1 - betas), rtol=1e-12)
    assert path.end == pytest.approx(0.999, abs=1e-15)
    assert float(path.alpha(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(0.999**0.5, rel=1e-15)
    assert stable_diffusion((0.002, 0.009)).end == 1.0
    assert stable_diffusion((0.002, 0.009), end=0.0).end == path.levels[0]
    experiment = load(schedule={"betas": [0.002, 0.009], "end": 0.5})
    assert process(experiment, 50)[0] == path


def test_the_end_of_a_folders_schedule_is_changed_too(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
    from flowtilt.domains.images.pipeline import build_schedule
    from flowtilt.domains.images.sections import ScheduleConfig

    (tmp_path / "scheduler").mkdir()
    settings = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    own = build_schedule(tmp_path)
    moved = build_schedule(tmp_path, ScheduleConfig(betas=(0.002, 0.009), end=0.5))
    assert own.end == own.levels[0]
    assert moved.end == pytest.approx(0.999, abs=1e-7)  # diffusers sums in 32 bits
    assert moved.end == pytest.approx((moved.levels[0] + 1) / 2, abs=1e-15)


# --- Prompt dropout -----------------------------------------------------------------------------


class Denoiser(torch.nn.Module):
    """A smooth function of state, timestep and prompt, that remembers the prompts it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor) -> Any:
        self.seen.append(embeddings)
        shift = embeddings.sum((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000
        return SimpleNamespace(sample=self.gain * torch.tanh(x + shift))


def flow_with(dropout: float) -> LatentFlow:
    guidance = GuidanceConfig(sampling=3.0, dropout=dropout)
    flow = LatentFlow(Denoiser(), stable_diffusion(), (1, 2, 2), guidance=guidance)
    table = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(9))
    flow.use_prompts(table, torch.zeros(2, 4))
    return flow


def test_as_many_prompts_are_dropped_as_asked_for_and_only_in_training() -> None:
    flow, random = flow_with(0.2), torch.Generator().manual_seed(0)
    context = flow.training_context(20_000, random)
    share = float(context.dropped.double().mean())
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5
    assert flow.draw_context(100, random).dropped is None
    same = [flow_with(rate).training_context(50, torch.Generator().manual_seed(1)) for rate in (0.0, 0.2)]
    assert same[0].dropped is None
    assert torch.equal(same[0].prompt, same[1].prompt)


def test_a_dropped_prompt_has_the_empty_ones_velocity_in_sampling_adjoint_and_control() -> None:
    """The reward still sees its own prompt, whose position stays."""
    flow = flow_with(0.5)
    context = flow.training_context(6, torch.Generator().manual_seed(2))
    assert 0 < int(context.dropped.sum()) < 6
    x = torch.randn(6, *flow.shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor(0.4)
    empty = replace(context, dropped=torch.ones(6, dtype=torch.bool))
    plain = replace(context, dropped=None)
    for use in ("sampling", "adjoint", "control"):
        found, without, own = (
            flow.velocity(x, t, flow.context_for(use, one)) for one in (context, empty, plain)
        )
        expected = torch.where(context.dropped.view(-1, 1, 1, 1), without, own)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(without, own)
        chosen = torch.tensor([4, 1])
        of_chosen = flow.velocity(x[chosen], t, flow.context_for(use, flow.select_context(context, chosen)))
        torch.testing.assert_close(of_chosen, found[chosen], rtol=1e-5, atol=1e-5)
    assert torch.equal(flow.context_labels(context), context.prompt)


def test_a_solve_takes_the_training_context() -> None:
    """One set of dropped prompts for trajectories, adjoints and loss of an update."""
    flow = flow_with(0.5)

    class Level(Reward):
        def value(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
            assert context.dropped is not None
            dropped.append(context.dropped)
            return x.flatten(1).sum(1)

    dropped: list[torch.Tensor] = []
    settings = AdjointMatchingSettings(updates=1, batch=4, pool=4, steps=5)
    tuned = solve(flow, RewardVariation(Level()), 1.0, settings, torch.Generator().manual_seed(4)).model
    seen = tuned.denoiser.seen
    assert all(torch.equal(one, dropped[0]) for one in dropped)
    empty = flow.prompts.empty
    counts = {bool((e == empty).all()) for batch in seen for e in batch}
    assert counts == {True, False}
    # In the loss, the last pass of the network, the trajectories of each step have one pattern.
    last = torch.stack([(e == empty).all() for e in seen[-1]]).view(-1, 4)
    assert (last == last[0]).all()
    assert torch.equal(last[0], dropped[0])


def test_dropout_belongs_to_adjoint_matching() -> None:
    fitted = {"solver": {"kind": "weighted_fitting"}}
    assert load(guidance={"dropout": 0.2}, methods={"am": fitted}).guidance.dropout == 0.2
    with pytest.raises(ConfigError, match=r"guidance\.dropout: no method is solved by Adjoint Matching"):
        load(guidance={"dropout": 0.2}, solver=fitted["solver"])


# --- A given threshold --------------------------------------------------------------------------


def test_a_threshold_belongs_to_tfft() -> None:
    assert load(methods={"tfft": {"threshold": 0.7}}).threshold_of("tfft") == 0.7
    assert load().threshold_of("tfft") is None
    with pytest.raises(ConfigError, match="threshold belongs to tfft, not to am"):
        load(methods={"am": {"threshold": 0.7}})


def test_a_given_threshold_stands_in_place_of_the_duals_which_is_written_beside_it(tmp_path: Path) -> None:
    from flowtilt import thresholds as duals
    from flowtilt.pipeline.domain import Job, Run
    from flowtilt.pipeline.stages import tilt_of
    from flowtilt.pipeline.thresholds import threshold

    experiment = load(methods={"tfft": {"threshold": 0.7}})
    rewards = np.random.default_rng(0).normal(0.6, 0.1, 100)
    batch, output = tmp_path / "offline.npz", tmp_path / "threshold.json"
    np.savez(batch, reward=rewards, context=np.zeros(100, dtype=np.int64))
    run = Run(str(tmp_path), experiment, "tfft", 0)
    threshold(Job(run, [experiment], {"offline": batch}, {"threshold": output}))
    row = json.loads(output.read_text())
    assert row["threshold"] == 0.7
    assert row["dual_threshold"] == pytest.approx(duals.threshold(rewards, 0.02, 0.2, "lower"))
    assert row["offline_active_share"] == pytest.approx((rewards < 0.7).mean())

    class Bench:
        reward = None
        job = Job(run, [experiment], {}, {})

    Bench.experiment = experiment  # type: ignore[attr-defined]
    tilt, weight = tilt_of(Bench(), output)  # type: ignore[arg-type]
    assert (tilt.threshold, tilt.mass, weight) == (0.7, 0.2, 0.02)  # type: ignore[union-attr]
