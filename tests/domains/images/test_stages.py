"""The stages of pictures by the command line, at tiny size: what they write, and bad input."""

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

from flowtilt import thresholds
from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.pipeline.cli import main
from flowtilt.pipeline.experiment import dump
from flowtilt.resuming import SECONDS
from small_pictures import tiny, write_models

pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
pytest.importorskip("open_clip", reason="the extra 'images' is not installed")

LEFT_TAIL, ENTROPY = "text_to_image_left_tail", "text_to_image_entropy"


class Folder:
    """A results folder driven by hand, one command a stage."""

    def __init__(self, path: Path, name: str, models: tuple[Path, Path], **changes: Any) -> None:
        self.path, self.config = path, path / "config.yaml"
        path.mkdir(parents=True, exist_ok=True)
        pipeline, alignment = ({"path": str(folder)} for folder in models)
        model = {"pipeline": pipeline, "alignment": alignment}
        self.use(tiny(name, retrain=False, model=model, **changes))

    def use(self, experiment: ImageExperiment) -> None:
        self.experiment = experiment
        self.config.write_text(dump(experiment))

    def file(self, name: str) -> Path:
        return self.path / name

    def run(self, stage: str, **options: Any) -> int:
        words = [f"images-{stage}", str(self.config)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return main(words)

    def model(self) -> int:
        return self.run("model", output=self.file("model.json"))

    def offline(self) -> int:
        return self.run("offline", seed=0, model=self.file("model.json"), output=self.file("offline.npz"))

    def threshold(self, method: str) -> int:
        files = {"offline": self.file("offline.npz"), "output": self.file(f"{method}.json")}
        return self.run("threshold", method=method, **files)

    def finetune(self, method: str, seed: int = 0, **more: Any) -> int:
        files = {
            "model": self.file("model.json"),
            "output": self.file(f"{method}.safetensors"),
            "history": self.file(f"{method}.csv"),
        }
        return self.run("finetune", method=method, seed=seed, **files, **more)

    def sample(self, method: str, **more: Any) -> int:
        files = {"model": self.file("model.json"), "output": self.file(f"{method}_pictures")}
        return self.run("sample", method=method, seed=0, **files, **more)

    def evaluate(self, method: str, **more: Any) -> int:
        files = {
            "model": self.file("model.json"),
            "pictures": self.file(f"{method}_pictures"),
            "output": self.file(f"{method}_metrics.json"),
            "scores": self.file(f"{method}_scores.npz"),
        }
        return self.run("evaluate", method=method, **files, **more)

    def metrics(self, method: str) -> dict[str, float]:
        return json.loads(self.file(f"{method}_metrics.json").read_text())["rows"][method]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def left_tail(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, Path]) -> Folder:
    """Everything up to tfft's run."""
    folder = Folder(tmp_path_factory.mktemp("left_tail"), LEFT_TAIL, models)
    assert folder.model() == 0
    assert folder.offline() == 0
    assert folder.threshold("tfft") == 0
    assert folder.finetune("tfft", threshold=folder.file("tfft.json")) == 0
    for method, more in (("pretrained", {}), ("tfft", {"weights": folder.file("tfft.safetensors")})):
        assert folder.sample(method, **more) == 0
    assert folder.evaluate("pretrained") == 0
    files = {"history": folder.file("tfft.csv"), "threshold": folder.file("tfft.json")}
    assert folder.evaluate("tfft", **files) == 0
    return folder


def test_the_model_file_says_where_and_what(left_tail: Folder, models: tuple[Path, Path]) -> None:
    found = json.loads(left_tail.file("model.json").read_text())
    assert found["pipeline"]["path"] == str(models[0])
    assert "unet/diffusion_pytorch_model.safetensors" in found["pipeline"]["sha256"]


def test_the_threshold_is_the_exact_dual_of_the_offline_batch(left_tail: Folder) -> None:
    with np.load(left_tail.file("offline.npz")) as arrays:
        rewards = arrays["reward"].astype(np.float64)
    found = json.loads(left_tail.file("tfft.json").read_text())
    objective = left_tail.experiment.objective
    assert found["threshold"] == thresholds.threshold(rewards, objective.alpha, 0.2, "lower")
    assert found["offline_samples"] == 12


def test_metrics_are_those_of_the_stored_pictures(left_tail: Folder, models: tuple[Path, Path]) -> None:
    """Recomputed from the PNG files with open_clip and vendi-score themselves."""
    import open_clip
    import torch
    from PIL import Image
    from vendi_score import vendi

    name = f"local-dir:{models[1]}"
    network, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    files = sorted(left_tail.file("tfft_pictures").glob("*.png"))
    assert len(files) == 12
    prompts = [left_tail.experiment.prompts[int(file.name[6:9])] for file in files]
    with torch.no_grad():
        pictures = torch.stack([preprocess(Image.open(file)) for file in files])
        features = network.eval().encode_image(pictures, normalize=True)
        texts = network.encode_text(tokenizer(prompts), normalize=True)
    scores = (features * texts).sum(1).double().numpy()
    found = left_tail.metrics("tfft")
    assert found["clip"] == pytest.approx(scores.mean(), abs=1e-5)
    assert found["mean_reward"] == found["clip"]
    assert found["left_cvar_0.2"] == pytest.approx(lower_tail_mean(scores, 0.2), abs=1e-5)
    assert found["vendi"] == pytest.approx(vendi.score_dual(features.double().numpy()), rel=1e-4)
    history = pd.read_csv(left_tail.file("tfft.csv"))
    assert found["active_share"] == pytest.approx(history["active_share"].mean())
    with np.load(left_tail.file("tfft_scores.npz")) as arrays:
        np.testing.assert_allclose(arrays["reward"], scores, atol=1e-5)


def test_methods_of_a_seed_have_the_same_noise(left_tail: Folder) -> None:
    """An untouched copy of the weights gives the pretrained model's pictures."""
    from flowtilt.checkpoints import save_weights
    from flowtilt.domains.images.sampling import load_base, read_pictures

    weights = left_tail.file("same.safetensors")
    save_weights(load_base(left_tail.experiment, left_tail.file("model.json")).flow, weights)
    output = left_tail.file("same_pictures")
    files = {"model": left_tail.file("model.json"), "weights": weights, "output": output}
    assert left_tail.run("sample", method="tfft", seed=0, **files) == 0
    same, prompts = read_pictures(output)
    own, _ = read_pictures(left_tail.file("pretrained_pictures"))
    tuned, _ = read_pictures(left_tail.file("tfft_pictures"))
    assert (same == own).all()
    assert (tuned != own).any()
    assert np.bincount(prompts).tolist() == [4, 4, 4]


def test_exploration_runs_and_covers_designs(tmp_path: Path, models: tuple[Path, Path]) -> None:
    folder = Folder(tmp_path, ENTROPY, models)
    assert folder.model() == 0
    for method in ("am", "fdc"):
        assert folder.finetune(method) == 0
        assert folder.sample(method, weights=folder.file(f"{method}.safetensors")) == 0
        assert folder.evaluate(method, history=folder.file(f"{method}.csv")) == 0
        found = folder.metrics(method)
        assert 1 <= found["designs_covered"] <= 5
        assert sum(found[f"share_{name}"] for name in folder.experiment.evaluation.designs) == pytest.approx(
            1
        )
    history = pd.read_csv(folder.file("fdc.csv"))
    assert history["iteration"].tolist() == [1] * 30 + [2] * 30


def test_diversity_is_the_mean_over_sets(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Vendi scores of each set by the package itself, and combinations by a Python set."""
    import torch
    from vendi_score.vendi import score_dual

    from flowtilt.domains.images.sampling import as_pictures, load_scorer, read_pictures

    factors = [
        {"classes": ["red", "blue", "grey"], "template": "a {} bridge"},
        {"classes": ["by day", "at night"], "template": "a bridge {}"},
    ]
    asked = {"pictures": 5, "sets": 3, "factors": factors}
    changes = {"prompts": ["a bridge", "a red bridge"], "evaluation": asked}
    folder = Folder(tmp_path, ENTROPY, models, **changes)
    assert folder.model() == 0
    assert folder.sample("pretrained") == 0
    assert folder.evaluate("pretrained") == 0
    pictures, _ = read_pictures(folder.file("pretrained_pictures"))
    scorer = load_scorer(folder.experiment, folder.file("model.json"))
    with torch.no_grad():
        features = scorer.picture_features(as_pictures(pictures)).double()
    # Of two prompts, fifteen pictures each, the first five of both are the first set.
    sets = [[*range(k, k + 5), *range(15 + k, 20 + k)] for k in (0, 5, 10)]
    found = folder.metrics("pretrained")
    expected = np.mean([score_dual(features[index].numpy()) for index in sets])
    assert found["vendi"] == pytest.approx(expected, rel=1e-6)
    halves = [half for index in sets for half in (index[:5], index[5:])]
    of_a_prompt = np.mean([score_dual(features[half].numpy()) for half in halves])
    assert found["vendi_of_a_prompt"] == pytest.approx(of_a_prompt, rel=1e-6)
    classes = [features @ scorer.text_features(_captions(f)).double().T for f in factors]
    with np.load(folder.file("pretrained_scores.npz")) as arrays:
        design, told = arrays["design"], arrays["factors"]
    assert (told == torch.stack([c.argmax(1) for c in classes], 1).numpy()).all()
    combined = [len({(design[i], *told[i]) for i in index}) for index in sets]
    assert found["combinations_covered"] == pytest.approx(np.mean(combined))
    assert found["designs_covered"] == pytest.approx(np.mean([len(set(design[index])) for index in sets]))
    assert found["share_beam"] == pytest.approx((design == 0).mean())


def _captions(factor: dict[str, Any]) -> list[str]:
    return [factor["template"].replace("{}", name) for name in factor["classes"]]


def test_a_second_set_leaves_the_first_as_it_is(tmp_path: Path, models: tuple[Path, Path]) -> None:
    from flowtilt.domains.images.sampling import CHUNK, read_pictures

    drawn = []
    for sets in (1, 2):
        changes = {"evaluation": {"pictures": CHUNK, "sets": sets, "factors": []}, "solver": {"steps": 2}}
        folder = Folder(tmp_path / str(sets), ENTROPY, models, **changes)
        assert folder.model() == 0
        assert folder.sample("pretrained") == 0
        drawn.append(read_pictures(folder.file("pretrained_pictures"))[0])
    assert len(drawn[1]) == 2 * CHUNK
    assert (drawn[1][:CHUNK] == drawn[0]).all()


def test_the_order_of_pictures_is_that_of_their_numbers(tmp_path: Path) -> None:
    """Names of more than 1,000 prompts or 10,000 pictures of one are not in this order as text."""
    from PIL import Image

    from flowtilt.domains.images.evaluation import set_of
    from flowtilt.domains.images.files import picture_name
    from flowtilt.domains.images.sampling import read_pictures

    places = [(999, 0), (1000, 1), (1000, 0), (2, 10_000), (2, 9_999), (10_001, 0), (101, 3)]
    for i, place in enumerate(places):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(tmp_path / picture_name(*place))
    pictures, prompts = read_pictures(tmp_path)
    ordered = sorted(places)
    assert prompts.tolist() == [prompt for prompt, _ in ordered]
    assert pictures[:, 0, 0, 0].tolist() == [places.index(place) for place in ordered]
    assert set_of(prompts, 1).tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert set_of(np.array([7, 3, 7, 7, 3, 12, 7]), 2).tolist() == [0, 0, 0, 1, 0, 0, 1]


def test_a_step_of_exploration_weighs_one_plus_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which entropy and divergence together are smooth; a step of half the size weighs twice as much."""
    from flowtilt.domains.images import finetuning as image_finetuning
    from flowtilt.fdc import Ascent
    from flowtilt.resuming import Resumption

    class Base:
        path = None

    weights = []

    def ascend(start: Any, objective: Any, iterations: Any, settings: Any, *more: Any) -> Ascent:
        weights.append((objective.alpha, settings.step_weight))
        return Ascent(start)

    monkeypatch.setattr(image_finetuning, "ascend", ascend)
    monkeypatch.setattr(image_finetuning, "noisy_time", lambda *given: 0.5)
    methods = {"half": {"kind": "fdc", "iterations": 2, "step": 0.5, "alpha": 3.0}}
    experiment = tiny(ENTROPY, objective={"alpha": 1.0}, methods=methods)
    for method in ("fdc", "half"):
        nothing: Any = Resumption.__new__(Resumption)
        image_finetuning._explore(experiment, method, 0, Base(), None, nothing)  # type: ignore[arg-type]
    assert weights == [(1.0, 2.0), (3.0, 8.0)]


def test_only_adapters_are_tuned_if_there_are_any(
    tmp_path: Path, models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path, ENTROPY, models, adapter={"rank": 2, "alpha": 2.0})
    assert folder.model() == 0
    assert folder.finetune("am") == 0
    tensors = load_tensors(folder.file("am.safetensors"))
    assert tensors
    assert all("lora_" in name for name in tensors)
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    assert folder.sample("am", weights=folder.file("am.safetensors")) == 0
    folder.use(tiny(ENTROPY, retrain=False, model=_sources(models), adapter={"rank": 2, "alpha": 4.0}))
    assert folder.sample("am", weights=folder.file("am.safetensors")) == 1
    assert "am.safetensors: made for another network: its adapter has the alpha 2.0, and" in caplog.text


def _sources(models: tuple[Path, Path]) -> dict[str, Any]:
    return {part: {"path": str(p)} for part, p in zip(("pipeline", "alignment"), models, strict=True)}


def test_an_interrupted_fine_tuning_goes_on_exactly(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates on each pool: a state is only kept where a pool ends."""
    from flowtilt import resuming

    changes = {"solver": {"updates": 6, "passes": 2, "micro_batch": 2}}
    whole = Folder(tmp_path / "whole", ENTROPY, models, **changes)
    assert whole.model() == 0
    assert whole.finetune("am") == 0
    cut = Folder(tmp_path / "cut", ENTROPY, models, **changes)
    shutil.copy(whole.file("model.json"), cut.file("model.json"))
    monkeypatch.setenv(SECONDS, "0")
    add, seen = resuming.TrainingState.add, []

    def stop_at_the_fourth(self: Any, row: Any, *more: Any, **named: Any) -> None:
        add(self, row, *more, **named)
        seen.append(row["update"])
        if len(seen) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resuming.TrainingState, "add", stop_at_the_fourth)
        assert cut.finetune("am") == 130
    assert cut.finetune("am") == 0
    own, other = (load_tensors(folder.file("am.safetensors")) for folder in (whole, cut))
    assert all((own[name] == other[name]).all() for name in own)
    updates = pd.read_csv(cut.file("am.csv"))["update"].tolist()
    assert updates == list(range(6))


@pytest.mark.slow
def test_the_embedded_models_are_trained_and_used(tmp_path: Path) -> None:
    experiment = tiny(ENTROPY)
    config = tmp_path / "config.yaml"
    config.write_text(dump(experiment))
    for part in ("pipeline", "alignment"):
        output = tmp_path / "models" / part / "weights"
        assert main(["images-pretrain", str(config), "--part", part, "--output", str(output)]) == 0
        record = json.loads((output / "training.json").read_text())
        assert record["configuration"]["bridges"]["count"] == 24
        assert not (output.parent / "state").exists()
        for name, history in record["trainings"].items():
            assert history["loss"], name
    trained = tmp_path / "models"
    options = [
        "--pipeline",
        trained / "pipeline" / "weights",
        "--alignment",
        trained / "alignment" / "weights",
    ]
    output = tmp_path / "model.json"
    assert main(["images-model", str(config), *map(str, options), "--output", str(output)]) == 0
    files = {"model": output, "output": tmp_path / "pictures"}
    words = [word for name, value in files.items() for word in (f"--{name}", str(value))]
    assert main(["images-sample", str(config), "--method", "pretrained", "--seed", "0", *words]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4


# ---------------------------------------------------------------------------------- bad input


def test_a_changed_file_of_the_model_is_refused(
    tmp_path: Path, models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path, ENTROPY, models)
    sources = _sources(models)
    sources["pipeline"]["sha256"] = {"unet/diffusion_pytorch_model.safetensors": "0" * 64}
    folder.use(tiny(ENTROPY, retrain=False, model=sources))
    assert folder.model() == 1
    assert "pipeline.sha256" in caplog.text
    assert "has the SHA-256" in caplog.text


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named_before_any_training(
    tmp_path: Path, models: tuple[Path, Path], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models[0], tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / part)
    folder = Folder(tmp_path, ENTROPY, (tmp_path / "pipeline", models[1]))
    assert folder.model() == 1
    assert f"pipeline/{part}" in caplog.text
    assert not folder.file("model.json").exists()


def test_an_experiment_without_thresholds_has_no_offline_batch(
    left_tail: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = tiny(ENTROPY, offline=None)
    (tmp_path / "config.yaml").write_text(dump(experiment))
    files = ["--model", str(left_tail.file("model.json")), "--output", str(tmp_path / "no.npz")]
    assert main(["images-offline", str(tmp_path / "config.yaml"), "--seed", "0", *files]) == 1
    assert f"experiment {ENTROPY}: has no key offline" in caplog.text


def test_a_gpu_that_is_not_there_is_refused(
    left_tail: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    files = {"model": left_tail.file("model.json"), "output": left_tail.file("no.npz")}
    assert left_tail.run("offline", seed=0, gpu=1, **files) == 1
    assert "key gpu: the job was to have 1, and torch sees 0" in caplog.text


def test_pictures_that_are_not_finite_are_refused(
    left_tail: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    tensors = load_tensors(left_tail.file("tfft.safetensors"))
    tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], 3e38)  # finite, as weights must be
    save_file(tensors, tmp_path / "huge.safetensors")
    output = tmp_path / "pictures"
    files = {
        "model": left_tail.file("model.json"),
        "weights": tmp_path / "huge.safetensors",
        "output": output,
    }
    assert left_tail.run("sample", method="tfft", seed=0, **files) == 1
    assert "4 pictures are not finite" in caplog.text or "12 pictures are not finite" in caplog.text
    assert not output.exists()


def test_too_few_pictures_are_refused(left_tail: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder = left_tail.file("few_pictures")
    shutil.copytree(left_tail.file("tfft_pictures"), folder)
    next(iter(folder.glob("*.png"))).unlink()
    files = {"model": left_tail.file("model.json"), "pictures": folder}
    outputs = {"output": left_tail.file("few.json"), "scores": left_tail.file("few.npz")}
    assert left_tail.run("evaluate", method="tfft", **files, **outputs) == 1
    assert "11 pictures, not 12" in caplog.text


def test_messages_come_once_and_the_advice_last(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Although open_clip gives the root logger a handler once it loads a model."""
    folder = Folder(tmp_path, LEFT_TAIL, models, prompts=["a bridge", "a bridge and " * 40])
    assert folder.model() == 0
    files = {"model": "model.json", "output": "tuned.safetensors", "history": "tuned.csv"}
    words = ["images-finetune", folder.config, "--method", "tfft", "--seed", "0"]
    for name, file in files.items():
        words += [f"--{name}", folder.file(file)]
    command = [sys.executable, "-c", "from flowtilt.pipeline.cli import run; raise SystemExit(run())"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    advice = "images-finetune: method 'tfft' needs --threshold, the file of the threshold stage"
    assert done.returncode == 1
    assert lines[-1] == advice
    assert "Traceback" not in done.stderr
    assert sum(advice in line for line in lines) == 1
    assert sum("what comes after is not seen" in line for line in lines) == 1
    assert sum("the model sees 28 of them" in line for line in lines) == 1
