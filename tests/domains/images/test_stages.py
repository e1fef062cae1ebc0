"""The stages of images by the command line, at tiny size: what they write, and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file as load_tensors

from by_hand import Driven
from flowtilt import thresholds
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.pipeline.configuration import merge
from flowtilt.pipeline.domain import job_of
from flowtilt.resuming import SECONDS
from small_images import tiny, write_models

pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
pytest.importorskip("open_clip", reason="the extra 'images' is not installed")

LEFT_TAIL, ENTROPY = "text_to_image_left_tail", "text_to_image_entropy"


class Folder(Driven):
    """A results folder for a shipped experiment at tiny size on models that are there."""

    def __init__(self, path: Path, name: str, models: tuple[Path, Path], **changes: Any) -> None:
        model = merge(_sources(models), changes.pop("model", {}))
        super().__init__(path, tiny(name, retrain=False, model=model, **changes))

    @property
    def model(self) -> Path:
        return self.shared("model.json")

    def images(self, method: str) -> Path:
        return self.file(method, "images")

    def assess(self, method: str) -> int:
        return self.run("sample", method) or self.run("evaluate", method)

    def metrics(self, method: str) -> dict[str, float]:
        return json.loads(self.file(method, "metrics.json").read_text())["rows"][method]

    def copy(self, path: Path, *methods: str) -> Folder:
        """Another folder with the same experiment, model, and runs of some methods."""
        other = object.__new__(Folder)
        Driven.__init__(other, path, self.experiment)
        for name in ("pretrained", *methods):
            place = Path("runs") / self.experiment.name / name
            shutil.copytree(self.path / place, path / place)
        return other


def _sources(models: tuple[Path, Path]) -> dict[str, Any]:
    return {part: {"path": str(p)} for part, p in zip(("pipeline", "alignment"), models, strict=True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def left_tail(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, Path]) -> Folder:
    """Everything up to tfft's run."""
    folder = Folder(tmp_path_factory.mktemp("left_tail"), LEFT_TAIL, models)
    for stage, method in (("model", ""), ("offline", ""), ("threshold", "tfft"), ("finetune", "tfft")):
        assert folder.run(stage, method) == 0
    for method in ("pretrained", "tfft"):
        assert folder.assess(method) == 0
    return folder


@pytest.mark.slow
def test_the_model_file_says_where_and_what(left_tail: Folder, models: tuple[Path, Path]) -> None:
    found = json.loads(left_tail.model.read_text())
    assert found["pipeline"]["path"] == str(models[0])
    assert "unet/diffusion_pytorch_model.safetensors" in found["pipeline"]["sha256"]


def test_the_threshold_is_the_exact_dual_of_the_offline_batch(left_tail: Folder) -> None:
    with np.load(left_tail.shared("seed0/offline.npz")) as arrays:
        rewards, prompts = arrays["reward"].astype(np.float64), arrays["context"]
    assert len(np.unique(prompts)) > 1  # with fewer than ten images each: they are taken together
    found = json.loads(left_tail.file("tfft", "threshold.json").read_text())
    objective = left_tail.experiment.objective
    assert found["threshold"] == thresholds.threshold(rewards, objective.alpha, 0.2, "lower")
    assert found["offline_samples"] == found["offline_pooled"] == 12


def test_metrics_are_those_of_the_stored_images(left_tail: Folder, models: tuple[Path, Path]) -> None:
    """Recomputed from the PNG files with open_clip and vendi-score themselves."""
    import open_clip
    from PIL import Image
    from vendi_score import vendi

    name = f"local-dir:{models[1]}"
    network, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    files = sorted(left_tail.images("tfft").glob("*.png"))
    assert len(files) == 12
    prompts = [left_tail.experiment.prompts[int(file.name[6:9])] for file in files]
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(file)) for file in files])
        features = network.eval().encode_image(images, normalize=True)
        texts = network.encode_text(tokenizer(prompts), normalize=True)
    scores = (features * texts).sum(1).double().numpy()
    found = left_tail.metrics("tfft")
    assert found["clip"] == pytest.approx(scores.mean(), abs=1e-5)
    assert found["mean_reward"] == found["clip"]
    assert found["left_cvar_0.2"] == pytest.approx(lower_tail_mean(scores, 0.2), abs=1e-5)
    assert found["vendi"] == pytest.approx(vendi.score_dual(features.double().numpy()), rel=1e-4)
    history = pd.read_csv(left_tail.file("tfft", "history.csv"))
    assert found["active_share"] == pytest.approx(history["active_share"].mean())
    with np.load(left_tail.file("tfft", "scores.npz")) as arrays:
        np.testing.assert_allclose(arrays["reward"], scores, atol=1e-5)


def test_methods_of_a_seed_have_the_same_noise(left_tail: Folder, tmp_path: Path) -> None:
    """An untouched copy of the weights gives the pretrained model's images."""
    from flowtilt.checkpoints import save_weights
    from flowtilt.domains.images.sampling import load_base, read_images

    untouched = left_tail.copy(tmp_path)
    weights = untouched.file("tfft", "model.safetensors")
    weights.parent.mkdir(parents=True)
    save_weights(load_base(left_tail.experiment, left_tail.model).flow, weights)
    assert untouched.run("sample", "tfft") == 0
    same, prompts = read_images(untouched.images("tfft"))
    own, _ = read_images(left_tail.images("pretrained"))
    tuned, _ = read_images(left_tail.images("tfft"))
    assert (same == own).all()
    assert (tuned != own).any()
    assert np.bincount(prompts).tolist() == [4, 4, 4]


@pytest.mark.slow
def test_exploration_runs_and_covers_designs(tmp_path: Path, models: tuple[Path, Path]) -> None:
    folder = Folder(tmp_path, ENTROPY, models)
    assert folder.run("model") == 0
    for method in ("am", "fdc"):
        assert folder.run("finetune", method) == 0
        assert folder.assess(method) == 0
        found = folder.metrics(method)
        assert 1 <= found["designs_covered"] <= 5
        assert sum(found[f"share_{name}"] for name in folder.experiment.evaluation.designs) == pytest.approx(
            1
        )
    history = pd.read_csv(folder.file("fdc", "history.csv"))
    assert history["iteration"].tolist() == [1] * 30 + [2] * 30


def test_diversity_is_the_mean_over_sets(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Vendi scores of each set by the package itself, and combinations by a Python set."""
    from vendi_score.vendi import score_dual

    from flowtilt.domains.images.sampling import as_images, load_scorer, read_images

    factors = [
        {"classes": ["red", "blue", "grey"], "template": "a {} bridge"},
        {"classes": ["by day", "at night"], "template": "a bridge {}"},
    ]
    asked = {"images": 5, "sets": 3, "factors": factors}
    changes = {"prompts": ["a bridge", "a red bridge"], "evaluation": asked}
    folder = Folder(tmp_path, ENTROPY, models, **changes)
    assert folder.run("model") == 0
    assert folder.assess("pretrained") == 0
    images, _ = read_images(folder.images("pretrained"))
    scorer = load_scorer(folder.experiment, folder.model)
    with torch.no_grad():
        features = scorer.image_features(as_images(images)).double()
    # Of two prompts, fifteen images each, the first five of both are the first set.
    sets = [[*range(k, k + 5), *range(15 + k, 20 + k)] for k in (0, 5, 10)]
    found = folder.metrics("pretrained")
    expected = np.mean([score_dual(features[index].numpy()) for index in sets])
    assert found["vendi"] == pytest.approx(expected, rel=1e-6)
    halves = [half for index in sets for half in (index[:5], index[5:])]
    of_a_prompt = np.mean([score_dual(features[half].numpy()) for half in halves])
    assert found["vendi_of_a_prompt"] == pytest.approx(of_a_prompt, rel=1e-6)
    classes = [features @ scorer.text_features(_captions(f)).double().T for f in factors]
    with np.load(folder.file("pretrained", "scores.npz")) as arrays:
        design, told = arrays["design"], arrays["factors"]
    assert (told == torch.stack([c.argmax(1) for c in classes], 1).numpy()).all()
    combined = [len({(design[i], *told[i]) for i in index}) for index in sets]
    assert found["combinations_covered"] == pytest.approx(np.mean(combined))
    assert found["designs_covered"] == pytest.approx(np.mean([len(set(design[index])) for index in sets]))
    assert found["share_beam"] == pytest.approx((design == 0).mean())


def _captions(factor: dict[str, Any]) -> list[str]:
    return [factor["template"].replace("{}", name) for name in factor["classes"]]


def test_a_second_set_leaves_the_first_as_it_is(tmp_path: Path, models: tuple[Path, Path]) -> None:
    from flowtilt.domains.images.sampling import CHUNK, read_images

    drawn = []
    for sets in (1, 2):
        changes = {"evaluation": {"images": CHUNK, "sets": sets, "factors": []}, "solver": {"steps": 2}}
        folder = Folder(tmp_path / str(sets), ENTROPY, models, **changes)
        assert folder.run("model") == 0
        assert folder.run("sample", "pretrained") == 0
        drawn.append(read_images(folder.images("pretrained"))[0])
    assert len(drawn[1]) == 2 * CHUNK
    assert (drawn[1][:CHUNK] == drawn[0]).all()


def test_the_order_of_images_is_that_of_their_numbers(tmp_path: Path) -> None:
    """Names of more than 1,000 prompts or 10,000 images of one are not in this order as text."""
    from PIL import Image

    from flowtilt.domains.images.evaluation import set_of
    from flowtilt.domains.images.experiment import image_name
    from flowtilt.domains.images.sampling import read_images

    places = [(999, 0), (1000, 1), (1000, 0), (2, 10_000), (2, 9_999), (10_001, 0), (101, 3)]
    for i, place in enumerate(places):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(tmp_path / image_name(*place))
    images, prompts = read_images(tmp_path)
    ordered = sorted(places)
    assert prompts.tolist() == [prompt for prompt, _ in ordered]
    assert images[:, 0, 0, 0].tolist() == [places.index(place) for place in ordered]
    assert set_of(prompts, 1).tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert set_of(np.array([7, 3, 7, 7, 3, 12, 7]), 2).tolist() == [0, 0, 0, 1, 0, 0, 1]


def test_a_step_of_exploration_weighs_one_plus_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which entropy and divergence together are smooth; a step of half the size weighs twice as much."""
    from flowtilt.domains.images import bench

    class Base:
        path = None

    monkeypatch.setattr(bench, "noisy_time", lambda *given: 0.5)
    monkeypatch.setattr(bench.ImagesBench, "flow", Base())
    methods = {"half": {"kind": "fdc", "iterations": 2, "step": 0.5, "alpha": 3.0}}
    experiment = tiny(ENTROPY, objective={"alpha": 1.0}, methods=methods)
    weights = []
    for method in ("fdc", "half"):
        job = job_of("finetune", [experiment], method, 0, Path("results"))[1]
        climb = bench.ImagesBench(job).climb()
        weights.append((climb.objective.alpha, climb.settings.step_weight))
    assert weights == [(1.0, 2.0), (3.0, 8.0)]


def test_only_adapters_are_tuned_if_there_are_any(
    tmp_path: Path, models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path, ENTROPY, models, adapter={"rank": 2, "alpha": 2.0})
    assert folder.run("model") == 0
    assert folder.run("finetune", "am") == 0
    tensors = load_tensors(folder.file("am", "model.safetensors"))
    assert tensors
    assert all("lora_" in name for name in tensors)
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    assert folder.run("sample", "am") == 0
    folder.use(tiny(ENTROPY, retrain=False, model=_sources(models), adapter={"rank": 2, "alpha": 4.0}))
    assert folder.run("sample", "am") == 1
    assert (
        "am/seed0/model.safetensors: made for another network: its adapter has the alpha 2.0, and"
        in caplog.text
    )


@pytest.mark.slow
def test_an_interrupted_fine_tuning_goes_on_exactly(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates on each pool: a state is only kept where a pool ends."""
    from flowtilt import resuming

    changes = {"solver": {"updates": 6, "passes": 2, "micro_batch": 2}}
    whole = Folder(tmp_path / "whole", ENTROPY, models, **changes)
    assert whole.run("model") == 0
    assert whole.run("finetune", "am") == 0
    cut = whole.copy(tmp_path / "cut")
    monkeypatch.setenv(SECONDS, "0")
    add, seen = resuming.TrainingState.add, []

    def stop_at_the_fourth(self: Any, row: Any, *more: Any, **named: Any) -> None:
        add(self, row, *more, **named)
        seen.append(row["update"])
        if len(seen) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resuming.TrainingState, "add", stop_at_the_fourth)
        assert cut.run("finetune", "am") == 130
    assert cut.run("finetune", "am") == 0
    own, other = (load_tensors(folder.file("am", "model.safetensors")) for folder in (whole, cut))
    assert all((own[name] == other[name]).all() for name in own)
    updates = pd.read_csv(cut.file("am", "history.csv"))["update"].tolist()
    assert updates == list(range(6))


@pytest.mark.slow
def test_the_embedded_models_are_trained_and_used(tmp_path: Path) -> None:
    folder = Driven(tmp_path, tiny(ENTROPY))
    for part in ("pipeline", "alignment"):
        assert folder.run(f"pretrain-{part}") == 0
        output = tmp_path / "models" / "tiny" / part / "weights"
        record = json.loads((output / "training.json").read_text())
        assert record["configuration"]["bridges"]["count"] == 24
        assert not (output.parent / "state").exists()
        for name, history in record["trainings"].items():
            assert history["loss"], name
    assert folder.run("model") == 0
    assert folder.run("sample", "pretrained") == 0
    assert len(list(folder.file("pretrained", "images").glob("*.png"))) == 4


# ---------------------------------------------------------------------------------- bad input


def test_a_changed_file_of_the_model_is_refused(
    tmp_path: Path, models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path, ENTROPY, models)
    sources = _sources(models)
    sources["pipeline"]["sha256"] = {"unet/diffusion_pytorch_model.safetensors": "0" * 64}
    folder.use(tiny(ENTROPY, retrain=False, model=sources))
    assert folder.run("model") == 1
    assert "pipeline.sha256" in caplog.text
    assert "has the SHA-256" in caplog.text


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named_before_any_training(
    tmp_path: Path, models: tuple[Path, Path], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models[0], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / part)
    folder = Folder(tmp_path, ENTROPY, (tmp_path / "pipeline", models[1]))
    assert folder.run("model") == 1
    assert f"pipeline/{part}" in caplog.text
    assert not folder.model.exists()


def test_an_experiment_without_thresholds_has_no_offline_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Driven(tmp_path, tiny(ENTROPY, offline=None)).run("offline") == 1
    assert f"experiment {ENTROPY}: has no key offline" in caplog.text


def test_a_gpu_that_is_not_there_is_refused(
    left_tail: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert left_tail.run("offline", gpu=1) == 1
    assert "key gpu: the job was to have 1, and torch sees 0" in caplog.text


def test_images_that_are_not_finite_are_refused(
    left_tail: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    own = left_tail.copy(tmp_path)
    tensors = load_tensors(left_tail.file("tfft", "model.safetensors"))
    tensors["conv_out.bias"].fill_(3e38)  # finite, as weights must be
    own.images("tfft").parent.mkdir(parents=True)
    save_file(tensors, own.file("tfft", "model.safetensors"))
    assert own.run("sample", "tfft") == 1
    assert "4 images are not finite" in caplog.text or "12 images are not finite" in caplog.text
    assert not own.images("tfft").exists()


def test_too_few_images_are_refused(
    left_tail: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = left_tail.copy(tmp_path, "tfft")
    next(iter(own.images("tfft").glob("*.png"))).unlink()
    assert own.run("evaluate", "tfft") == 1
    assert "11 images, not 12" in caplog.text


@pytest.mark.slow
def test_messages_come_once_and_the_advice_last(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Although open_clip gives the root logger a handler once it loads a model."""
    folder = Folder(tmp_path, LEFT_TAIL, models, prompts=["a bridge", "a bridge and " * 40])
    assert folder.run("model") == 0
    command = [sys.executable, "-c", "from flowtilt.pipeline.cli import run; raise SystemExit(run())"]
    folder.shared("seed0").write_text("a file in the place of a folder")
    done = subprocess.run([*command, *folder.words("offline")], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    advice = "(no file can be written there; set the key results to a folder that you can write to)"
    assert done.returncode == 1
    assert lines[-1].startswith("offline: ")
    assert lines[-1].endswith(advice)
    assert "Traceback" not in done.stderr
    assert sum(advice in line for line in lines) == 1
    assert sum("the text encoder sees 28 of them" in line for line in lines) == 1
    assert sum("the model sees 28 of them" in line for line in lines) == 1


def test_the_papers_keys_go_through_the_stages(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """A buffer, drawn steps, smoothed gradients, dropped prompts, a given threshold, other prompts."""
    wishes = tmp_path / "refl_data.json"
    wishes.write_text(json.dumps([{"text": f"a bridge number {k}"} for k in range(7)]))
    solver = {
        "updates": 8,
        "pool": 6,
        "buffer": 6,
        "passes": 2,
        "micro_batch": 2,
        "loss_steps": [[0.6, 1], [1.0, 1]],
        "endpoint_perturbations": 2,
        "endpoint_deviation": 0.02,
        "endpoint_percentile": 85.0,
        "moments": [0.9, 0.95],
        "weight_decay": 0.01,
        "annealing": "none",
    }
    folder = Folder(
        tmp_path / "results",
        LEFT_TAIL,
        models,
        training_prompts=str(wishes),
        guidance={"dropout": 0.3},
        schedule={"betas": [0.002, 0.009], "end": 0.5},
        compute={"chunk": 4},
        solver=solver,
        methods={"tfft": {"threshold": 0.9}},
    )
    for stage, method in (("model", ""), ("offline", ""), ("threshold", "tfft"), ("finetune", "tfft")):
        assert folder.run(stage, method) == 0
    with np.load(folder.shared("seed0/offline.npz")) as arrays:
        assert set(arrays["context"]) == set(range(7))
    found = json.loads(folder.file("tfft", "threshold.json").read_text())
    assert found["threshold"] == 0.9 != found["dual_threshold"]
    history = pd.read_csv(folder.file("tfft", "history.csv"))
    assert len(history) == 8
    assert history["loss"].gt(0).all()
    # Two buffers of six trajectories in four updates each: only the first of these samples and solves.
    passes = history["network_passes"].diff().fillna(history["network_passes"][0])
    assert (passes[[0, 4]] > 3 * passes[1]).all()
    assert passes[[1, 2, 3, 5, 6, 7]].nunique() == 1
    assert folder.assess("tfft") == folder.assess("pretrained") == 0
    assert len(list(folder.images("tfft").glob("*.png"))) == 4 * 3
