"""Rewards of images: their values against the models themselves, their gradients against differences."""

import copy
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from flowtilt.checkpoints import CheckpointError
from flowtilt.domains.images.alignment import AlignmentModel
from flowtilt.domains.images.model import Prompted
from flowtilt.domains.images.rewards import ClipReward, ImageReward
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.rewards import Reward, RewardError

PROMPTS = ["a red bridge", "a stone arch over the sea", "night"]
WORDS = 17  # of the stand-in's vocabulary


def prompted(*positions: int) -> Prompted:
    return Prompted(torch.tensor(positions), torch.zeros(3, 2, 4), torch.zeros(2, 4))


def latents(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode(x: torch.Tensor) -> torch.Tensor:
    """Smooth images in [-1, 1] of 12 pixels a side, larger than the model's and smaller than 224."""
    wide = nn.functional.interpolate(x, scale_factor=4, mode="bilinear")
    return torch.tanh(0.6 * torch.stack([wide[:, 0] + wide[:, 3], wide[:, 1] - wide[:, 3], wide[:, 2]], 1))


@pytest.fixture(scope="module")
def model() -> AlignmentModel:
    """A CLIP of open_clip with random weights, large enough that images and texts matter."""
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "layers": 1, "heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = open_clip.CLIP(6, vision, text)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 2
    settings = {"size": 8, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.25]}
    return AlignmentModel(network, open_clip.SimpleTokenizer(context_length=12), settings)


def check_gradient(reward: Reward, x: torch.Tensor, context: Prompted) -> None:
    """In float64, along a random direction a sample. The error of a central difference falls as the square
    of the step, so that it is a third of how far that of twice the step is off, and nearly nothing once
    that third is taken off."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)

    def difference(step: float) -> torch.Tensor:
        return (reward(x + step * direction, context) - reward(x - step * direction, context)) / (2 * step)

    once, twice = difference(1e-3), difference(2e-3)
    found = (reward.gradient(x, context) * direction).flatten(1).sum(1)
    assert once.abs().min() > 1e-3
    tolerance = ((twice - once).abs() / 30).clamp(min=1e-9)
    assert ((found - (once - (twice - once) / 3)).abs() < tolerance).all()


def test_clip_reward_is_the_similarity_with_the_samples_own_prompt(model):
    x, positions = latents(6), (2, 0, 1, 0, 0, 2)
    found = ClipReward(decode, model, PROMPTS)(x, prompted(*positions))
    expected = model.scores_of(model.image_features(decode(x)), [PROMPTS[i] for i in positions])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    others = model.scores_of(model.image_features(decode(x)), [PROMPTS[i] for i in (0, 1, 2, 1, 2, 0)])
    assert (found - others).abs().min() > 1e-3  # or any prompt would do


def test_texts_are_encoded_once(model, monkeypatch):
    reward = ClipReward(decode, model, PROMPTS)
    monkeypatch.setattr(model, "text_features", None)
    first, again = reward(latents(2), prompted(0, 1)), reward(latents(2), prompted(0, 1))
    assert torch.equal(first, again)


def test_gradient_of_clip_reward(model):
    """Through decoding, scaling and the model."""
    check_gradient(
        ClipReward(decode, copy.deepcopy(model).double(), PROMPTS),
        latents(3, torch.float64),
        prompted(0, 2, 1),
    )


def test_a_gradient_is_the_samples_own(model):
    reward = ClipReward(decode, model, PROMPTS)
    together = reward.gradient(latents(4), prompted(0, 2, 1, 1))
    alone = reward.gradient(latents(4)[1:2], prompted(2))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("decoder", [decode, lambda x: decode(x.nan_to_num(0, 1, -1))])
@pytest.mark.parametrize("use", [Reward.__call__, Reward.gradient])
def test_latents_that_are_not_finite_are_refused(model, bad, decoder, use):
    """Also where the decoder makes an ordinary image of them."""
    x = latents(3)
    x[1, 2, 0, 1] = bad
    with pytest.raises(RewardError, match="ClipReward is not finite on 1 of 3 samples"):
        use(ClipReward(decoder, model, PROMPTS), x, prompted(0, 1, 2))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "ClipReward needs the prompts of its samples"),
        (prompted(0), r"needs a prompt a sample; got \(1,\) for 2 samples"),
        (prompted(0, 3), "made with 3 prompts, and a sample has that at position 3"),
        (prompted(-1, 0), "made with 3 prompts, and a sample has that at position -1"),
    ],
)
def test_contexts_without_the_prompts_are_explained(model, context, message):
    with pytest.raises(ValueError, match=message):
        ClipReward(decode, model, PROMPTS)(latents(2), context)


# ImageReward, by a stand-in of the package's interface.


class StandInNetwork(nn.Module):
    """Scores bilinear in the image and the tokens seen, and checks what it is given."""

    def __init__(self, med_config: str, device: torch.device) -> None:
        super().__init__()
        assert med_config.endswith("med_config.json")
        assert torch.device(device) == torch.get_default_device()
        self.blip = nn.Module()
        self.blip.tokenizer = tokenise
        self.pixels = nn.Parameter(torch.zeros(WORDS, 3, 224, 224))
        self.drop = nn.Dropout(0.5)  # would show in the scores, were it on

    def score_gard(self, prompt_ids, prompt_attention_mask, image):
        assert image.shape == (len(prompt_ids), 3, 224, 224)
        assert prompt_ids.shape == prompt_attention_mask.shape == (len(image), 35)
        assert not prompt_attention_mask.is_floating_point()
        scores = torch.einsum("ncij,wcij->nw", torch.sin(self.drop(image)), self.pixels)
        seen = nn.functional.one_hot(prompt_ids, WORDS) * prompt_attention_mask[:, :, None]
        return (scores * seen.sum(1)).sum(1, keepdim=True)


def tokenise(text, padding=False, truncation=False, max_length=None, return_tensors=None):
    """As a tokenizer of transformers: one token a word, zeros for padding."""
    many = [text] if isinstance(text, str) else text
    ids = [[1 + len(word) % (WORDS - 1) for word in one.split()] for one in many]
    if return_tensors is None:
        assert isinstance(text, str)
        return SimpleNamespace(input_ids=ids[0])
    assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
    ids = [row[:max_length] for row in ids]
    mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in ids]
    ids = [row + [0] * (max_length - len(row)) for row in ids]
    return SimpleNamespace(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


@pytest.fixture
def package(monkeypatch) -> None:
    module = ModuleType("ImageReward")
    module.ImageReward = StandInNetwork  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", module)


@pytest.fixture
def weights(tmp_path):
    """In half precision, with a name that the network does not have."""
    pixels = torch.randn(WORDS, 3, 224, 224, generator=torch.Generator().manual_seed(5)) / 30
    path = tmp_path / "ImageReward.safetensors"
    save_file({"pixels": pixels.half(), "blip.positions": torch.arange(3)}, path)
    (tmp_path / "med_config.json").write_text("{}")
    return path


@pytest.mark.usefixtures("package")
def test_image_reward_gives_the_package_what_it_takes(weights):
    """Against torchvision's transforms on the same images, 12 pixels a side and not on hard edges."""
    x, positions = latents(4), (1, 0, 2, 1)
    reward = ImageReward(decode, PROMPTS, weights)
    found = reward(x, prompted(*positions))
    preprocess = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    tokens = tokenise([PROMPTS[i] for i in positions], "max_length", True, 35, "pt")
    images = preprocess((decode(x) + 1) / 2)
    expected = reward.network.score_gard(tokens.input_ids, tokens.attention_mask, images)[:, 0]
    # Pixels scaled in two orders differ by 1e-6, and six words weigh 150,528 of them by 1/30 and either
    # sign: 6 / 30 * sqrt(150,528) * 1e-6 = 8e-5.
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    assert expected.std() > 1
    assert next(reward.network.parameters()).dtype == torch.float32
    assert not any(p.requires_grad for p in reward.network.parameters())
    assert not reward.network.training


@pytest.mark.usefixtures("package")
def test_gradient_of_image_reward(weights):
    """With paler images, whose scaling cuts nothing off."""
    reward = ImageReward(lambda x: 0.9 * decode(x), PROMPTS, weights)
    reward.network.double()
    check_gradient(reward, latents(2, torch.float64), prompted(2, 1))


@pytest.mark.usefixtures("package")
def test_long_prompts_are_said(weights, caplog):
    long = " ".join(["bridge"] * 36)
    reward = ImageReward(decode, [" ".join(["bridge"] * 35), long], weights)
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt {long!r} has 36 tokens; the model sees 35 of them"
    ]
    same = reward(latents(1), prompted(0)), reward(latents(1), prompted(1))
    assert torch.equal(*same)


@pytest.mark.usefixtures("package")
def test_image_reward_takes_no_whole_numbers_for_weights(weights):
    save_file({"pixels": torch.ones(WORDS, 3, 224, 224, dtype=torch.int32)}, weights)
    with pytest.raises(CheckpointError, match=r"pixels has the type I32.*convert the weights again"):
        ImageReward(decode, PROMPTS, weights)


def test_without_the_package_the_key_is_named(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(
        ConfigError, match=r"reward\.kind: .* image-reward, which .*; pip install image-reward"
    ):
        ImageReward(decode, PROMPTS, weights)


def pickle(path):
    return path.rename(path.with_suffix(".pt"))


def absent(path):
    path.unlink()
    return path


def short(path):
    path.write_bytes(path.read_bytes()[:100])
    return path


def other_shape(path):
    save_file({"pixels": torch.zeros(2, 3)}, path)
    return path


def other_names(path):
    save_file({"other": torch.zeros(2, 3)}, path)
    return path


def no_settings(path):
    path.with_name("med_config.json").unlink()
    return path


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickle, r"ImageReward\.pt: weights are only read as safetensors, since a pickle can run code"),
        (absent, r"ImageReward\.safetensors: no such weights"),
        (short, r"ImageReward\.safetensors: not a complete safetensors file"),
        (other_shape, r"(?s)ImageReward\.safetensors: made for another network .*pixels"),
        (other_names, r"made for another network, it lacks 1 parameters, the first pixels"),
        (no_settings, r"med_config\.json: no such file; place that of the package"),
    ],
)
def test_weights_that_cannot_be_used_are_explained(weights, damage: Callable, message):
    with pytest.raises(CheckpointError, match=message):
        ImageReward(decode, PROMPTS, damage(weights))


def test_a_tokenizer_out_of_reach_is_explained(monkeypatch, weights):
    def offline(**settings):
        raise OSError("cannot reach the hub")

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(ImageReward=offline))
    with pytest.raises(CheckpointError, match=r"cannot reach the hub\); it needs the tokenizer bert-base"):
        ImageReward(decode, PROMPTS, weights)
