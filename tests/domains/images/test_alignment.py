"""Features and scores of images with texts, against open_clip itself on 8-bit images."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from flowtilt.checkpoints import CheckpointError
from flowtilt.domains.images.alignment import AlignmentModel, classify_features, fit, load_alignment
from flowtilt.domains.images.build import WEIGHTS_OF_CLIP, save_clip
from flowtilt.domains.images.sections import EmbeddedConfig
from flowtilt.pipeline.configuration import ConfigError

FIT = {"updates": 1}
CONFIG = EmbeddedConfig.model_validate(
    {
        "bridges": {"count": 8, "size": 16},
        "autoencoder": {"channels": [16, 16], "kl_weight": 1e-4, "fit": FIT},
        "text": {"merges": 300, "length": 12, "width": 16, "layers": 1, "heads": 2},
        "denoiser": {"channels": [16, 16], "head_width": 8, "fit": FIT},
        "alignment": {"embedding": 8, "patch": 4, "width": 16, "layers": 2, "heads": 2, "fit": FIT},
    }
)
PROMPTS = ["a red bridge", "a stone arch", "a red bridge", "over the sea"]
TINY = {  # as open_clip writes its own names; the vocabulary is that of its tokenizer
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Untrained weights in half precision, as they are shipped, spread so that images and texts matter."""
    path = tmp_path_factory.mktemp("clip")
    save_clip(CONFIG, path, None)
    weights = load_file(path / WEIGHTS_OF_CLIP)
    save_file({name: (2 * tensor).half() for name, tensor in weights.items()}, path / WEIGHTS_OF_CLIP)
    return path


@pytest.fixture(scope="module")
def model(folder) -> AlignmentModel:
    return load_alignment(str(folder))


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """One's own copy of the folder, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "clip"))


@pytest.fixture
def tiny_name(tmp_path, monkeypatch) -> str:
    """A model that open_clip knows by name, small."""
    factory = sys.modules["open_clip.factory"]
    (tmp_path / "ViT-tiny.json").write_text(json.dumps(TINY))
    hub = TINY | {"text_cfg": TINY["text_cfg"] | {"hf_tokenizer_name": "someone/tokenizer"}}
    (tmp_path / "ViT-hub.json").write_text(json.dumps(hub))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path)
    return "ViT-tiny"


def pixels(count: int, height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    """8-bit colours (count, height, width, 3): smooth with hard edges, where interpolation overshoots."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (count, 4, 4, 3)) * 255
    y, x = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noise = rng.integers(-40, 41, (count, height, width, 3))
    return (coarse[:, y][:, :, x] + noise).clip(0, 255).astype(np.uint8)


def as_tensor(colours: np.ndarray) -> torch.Tensor:
    """In [-1, 1], (n, 3, height, width)."""
    return torch.from_numpy(colours).permute(0, 3, 1, 2).float() / 127.5 - 1


def directly(name: str, colours: np.ndarray, prompts: list[str], weights: Path | None = None):
    """Unit features of images and texts, and their similarities, as open_clip computes them."""
    own, _, preprocess = open_clip.create_model_and_transforms(name, weights and str(weights))
    own.eval()
    images = torch.stack([preprocess(Image.fromarray(image)) for image in colours])
    with torch.no_grad():
        images = F.normalize(own.encode_image(images), dim=-1)
        texts = F.normalize(own.encode_text(open_clip.get_tokenizer(name)(prompts)), dim=-1)
    return images, texts, torch.stack([p @ t for p, t in zip(images, texts, strict=True)])


def test_features_and_scores_are_those_of_open_clip(model, folder):
    """To 1e-5: rounding of float32 in two orders. Half-precision weights are computed with in float32."""
    colours = pixels(4)
    images, texts, scores = directly(f"local-dir:{folder}", colours, PROMPTS)
    torch.testing.assert_close(model.image_features(as_tensor(colours)), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.text_features(PROMPTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.scores_of(model.image_features(as_tensor(colours)), PROMPTS), scores, atol=1e-5, rtol=0
    )
    assert scores.std() > 1e-2  # or the comparison would say nothing
    assert (texts[0] - texts[1]).norm() > 1e-2
    assert load_file(folder / WEIGHTS_OF_CLIP)["visual.proj"].dtype == torch.float16
    assert model.image_features(as_tensor(colours).half()).dtype == torch.float32


def test_a_built_in_name_takes_its_weights_from_a_file(tiny_name, tmp_path):
    """Images are normalised by CLIP's own mean and deviation, which another name does not say."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    made = open_clip.create_model(tiny_name, output_dict=False)
    save_file({name: (2 * tensor).contiguous() for name, tensor in made.state_dict().items()}, weights)
    before = torch.random.get_rng_state()
    found = load_alignment(tiny_name, weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    colours = pixels(4)
    images, texts, scores = directly(tiny_name, colours, PROMPTS, weights)
    torch.testing.assert_close(found.image_features(as_tensor(colours)), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text_features(PROMPTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.scores_of(found.image_features(as_tensor(colours)), PROMPTS), scores, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found.mean.flatten(), torch.tensor(open_clip.OPENAI_DATASET_MEAN))
    assert scores.std() > 1e-3


@pytest.mark.parametrize(
    ("shape", "contrast"),
    [((32, 32), 1.0), ((8, 8), 1.0), ((27, 27), 1.0), ((16, 27), 1.0), ((17, 16), 1.0), ((41, 20), 0.5)],
)
def test_images_of_other_sizes_are_scaled_and_cut_as_8_bit_ones(shape, contrast):
    """Either pass rounds by half a level, and the second stretches the first's error by the sum of its
    absolute weights, of which 5/4 halfway between pixels is the largest. Pillow rounds its weights to 22
    bits, which is nothing. At half the contrast nothing is cut off, so that the order does not matter."""
    colours = (127.5 + contrast * (pixels(3, *shape) - 127.5)).astype(np.uint8)
    preprocess = Compose([Resize(16, interpolation=InterpolationMode.BICUBIC), CenterCrop(16)])
    expected = np.stack([np.array(preprocess(Image.fromarray(image))) for image in colours])
    found = fit(as_tensor(colours), 16)
    assert found.shape == (3, 3, 16, 16)
    assert found.abs().max() <= 1
    levels = (found.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(levels - expected).max() < 0.5 + 1.25 * 0.5 + 0.01


def test_fit_leaves_the_right_size_alone():
    colours = as_tensor(pixels(2))
    assert torch.equal(fit(colours, 16), colours)


def test_settings_of_the_folder_are_followed(copied):
    """Mean, deviation and interpolation, at a size where they matter; 8-bit rounding remains."""
    settings = json.loads((copied / "open_clip_config.json").read_text())
    settings["preprocess_cfg"] = {
        "mean": [0.2, 0.3, 0.4],
        "std": [0.1, 0.3, 0.2],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    (copied / "open_clip_config.json").write_text(json.dumps(settings))
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{copied}")[2]
    found = load_alignment(str(copied))
    colours = pixels(2, 32, 32)
    images = torch.stack([preprocess(Image.fromarray(image)) for image in colours])
    ours = (fit(as_tensor(colours), 16, found.interpolation) + 1) / 2
    # Half a level each pass, since bilinear weights are positive; in units of the least deviation.
    assert ((ours - found.mean) / found.std - images).abs().max() < 1.01 / 255 / 0.1
    cubic = (fit(as_tensor(colours), 16) + 1) / 2
    assert ((cubic - found.mean) / found.std - images).abs().max() > 4 / 255 / 0.1
    with pytest.raises(ValueError, match="'squash', which is only done for square ones here; got 16 x 20"):
        found.image_features(torch.zeros(1, 3, 16, 20))


def test_features_have_a_gradient_through_the_scaling(model):
    """Against central differences in float64. Their error falls as the square of the step, so that it is a
    third of how far that of twice the step is off; rounding adds the machine precision over the step."""
    double = AlignmentModel(model.network, model.tokenizer, open_clip.get_model_preprocess_cfg(model.network))
    try:
        double = double.double()
        images = (0.5 * as_tensor(pixels(2, 20, 24))).double().requires_grad_(True)
        weights = torch.linspace(-1, 1, 8, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((double.image_features(images) @ weights).sum(), images)
        direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).double()

        def difference(step: float) -> float:
            with torch.no_grad():
                ahead, behind = (
                    (double.image_features(images + sign * step * direction) @ weights).sum()
                    for sign in (1, -1)
                )
            return float((ahead - behind) / (2 * step))

        once, twice = difference(1e-4), difference(2e-4)
        expected = once - (twice - once) / 3
        assert abs(expected) > 1e-2
        assert float((gradient * direction).sum()) == pytest.approx(expected, abs=abs(twice - once) / 30)
    finally:
        model.float()


def test_the_network_is_frozen_and_texts_and_scores_have_no_graph(model):
    images = torch.zeros(2, 3, 16, 16, requires_grad=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.network.modules())
    assert not model.scores_of(model.image_features(images), PROMPTS[:2]).requires_grad
    assert not model.text_features(PROMPTS).requires_grad
    assert model.image_features(images).requires_grad


def test_many_images_go_in_parts(model, monkeypatch):
    sizes = []
    forward = model.network.encode_image

    def counted(images, normalize):
        sizes.append(len(images))
        return forward(images, normalize=normalize)

    monkeypatch.setattr(model.network, "encode_image", counted)
    images = as_tensor(pixels(300))
    found = model.scores_of(model.image_features(images), ["a bridge"] * 300)
    assert sizes == [256, 44]
    alone = model.scores_of(model.image_features(images[290:291]), ["a bridge"])
    torch.testing.assert_close(found[290:291], alone, atol=1e-6, rtol=0)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("flowtilt")]


@pytest.mark.parametrize("kind", ["of transformers", "of open_clip"])
def test_long_prompts_are_said_and_cut_off(model, tiny_name, kind, caplog):
    if kind == "of open_clip":
        own = open_clip.create_model(tiny_name)
        model = AlignmentModel(
            own, open_clip.get_tokenizer(tiny_name), open_clip.get_model_preprocess_cfg(own)
        )
    limit = model.tokenizer.context_length
    fits, long = " ".join("a" * (limit - 2)), " ".join("a" * (limit + 3))
    with caplog.at_level(logging.WARNING, logger="flowtilt"):
        assert len(model.text_features([fits])) == 1
        assert not said(caplog)
        # What is cut off does not matter.
        features = model.text_features([long, long + " a a"])
    assert torch.equal(features[0], features[1])
    assert said(caplog) == [
        f"prompt {long!r} has {limit + 5} tokens; the model sees {limit} of them",
        f"prompt {long + ' a a'!r} has {limit + 7} tokens; the model sees {limit} of them",
    ]


def test_classes_are_those_of_the_most_similar_prompt(model):
    names = ["red", "stone {}", "sea"]
    images = as_tensor(pixels(40))
    prompts = ["a red bridge", "a stone {} bridge", "a sea bridge"]
    each = torch.stack(
        [model.scores_of(model.image_features(images), [prompt] * 40) for prompt in prompts], dim=1
    )
    found = classify_features(model.image_features(images), model, names, "a {} bridge")
    assert found.tolist() == [max(range(3), key=row.__getitem__) for row in each.tolist()]
    assert found.dtype == torch.long
    assert len(set(found.tolist())) > 1


def test_bad_input_is_explained(model):
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"expected images \(n, 3, height, width\), got \(2, 1, 16, 16\)"):
        model.image_features(images[:, :1])
    with pytest.raises(ValueError, match="got 2 and 1 prompts"):
        model.scores_of(model.image_features(images), ["a bridge"])
    with pytest.raises(ValueError, match=r"'a bridge' has no \{\}"):
        classify_features(model.image_features(images), model, ["red"], "a bridge")
    with pytest.raises(ValueError, match="without names"):
        classify_features(model.image_features(images), model, [], "a {} bridge")
    settings = {"size": (16, 20), "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match=r"takes \(16, 20\) pixels"):
        AlignmentModel(model.network, model.tokenizer, settings)


def no_settings(folder: Path) -> None:
    (folder / "open_clip_config.json").unlink()


def garbled_settings(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{")


def other_settings(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{}")


def text_of_the_hub(folder: Path) -> None:
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["hf_model_name"] = "someone/encoder"
    (folder / "open_clip_config.json").write_text(json.dumps(settings))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_OF_CLIP).unlink()


def pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS_OF_CLIP).rename(folder / "open_clip_pytorch_model.bin")


def short_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS_OF_CLIP).read_bytes()
    (folder / WEIGHTS_OF_CLIP).write_bytes(whole[: len(whole) // 2])


def other_weights(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS_OF_CLIP)
    weights["visual.proj"] = weights["visual.proj"][:, :4].contiguous()
    save_file(weights, folder / WEIGHTS_OF_CLIP)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "clip: no such folder"),
        (no_settings, r"open_clip_config\.json: no such file"),
        (garbled_settings, r"open_clip_config\.json: not a configuration of open_clip \(JSONDecodeError"),
        (other_settings, r"open_clip_config\.json: not a configuration of open_clip \(KeyError: 'model_cfg'"),
        (text_of_the_hub, "the text encoder someone/encoder would be read from the model hub"),
        (no_weights, r"open_clip_model\.safetensors: no such weights"),
        (pickled_weights, r"open_clip_model\.safetensors: no such weights; .* convert"),
        (short_weights, r"open_clip_model\.safetensors: not a complete safetensors file"),
        (other_weights, r"(?s)open_clip_model\.safetensors: not weights of .*visual\.proj"),
        (no_tokenizer, "clip: no tokenizer that can be read"),
    ],
)
def test_a_folder_that_cannot_be_used_is_explained(copied, damage, message):
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        load_alignment(str(copied))


def test_a_folder_has_its_own_weights(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"a folder has its own weights; leave out .*own\.safetensors"):
        load_alignment(str(folder), tmp_path / "own.safetensors")


def test_a_name_without_its_weights_is_explained(tiny_name, tmp_path):
    with pytest.raises(CheckpointError, match="ViT-tiny: a model without weights; the rule fetch_checkpoint"):
        load_alignment(tiny_name)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such weights of ViT-tiny"):
        load_alignment(tiny_name, tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="openai: weights are only read as safetensors"):
        load_alignment(tiny_name, Path("openai"))
    (tmp_path / "cut.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a complete safetensors file"):
        load_alignment(tiny_name, tmp_path / "cut.safetensors")


@pytest.mark.parametrize("name", ["ViT-hub", "ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_names_whose_parts_would_be_downloaded_are_refused(tiny_name, name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}: its tokenizer or text encoder would be downloaded"):
        load_alignment(name, tmp_path / "weights.safetensors")


def test_unknown_names_are_explained():
    with pytest.raises(ConfigError, match="ViT-none: not a model of open_clip"):
        load_alignment("ViT-none")
    with pytest.raises(CheckpointError, match="hf-hub:someone/model: no such folder"):
        load_alignment("hf-hub:someone/model")


def test_without_open_clip_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"open_clip is not installed; pip install 'flowtilt\[images\]'"):
        load_alignment("ViT-B-32")
