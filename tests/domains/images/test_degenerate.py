"""Degenerate images, texts and features: NaN for the one that is bad, or a clear refusal."""

import inspect
import math

import pytest
import torch
from torch import nn

from flowtilt.domains.images import alignment, rewards
from flowtilt.domains.images.alignment import (
    AlignmentModel,
    classify_features,
    finite,
    fit,
    load_alignment,
    similarity,
    warn_of_long,
)
from flowtilt.domains.images.model import Prompted
from flowtilt.domains.images.rewards import ClipReward, ImageReward
from flowtilt.rewards import RewardError

NAN, INF = math.nan, math.inf
PREPROCESSING = {"size": 4, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Network(nn.Module):
    """The mean colour of an image, and the length and the letters a and b of a text, as features."""

    def encode_image(self, images, normalize):
        features = images.mean((2, 3))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens, normalize):
        return nn.functional.normalize(tokens.float(), dim=-1) if normalize else tokens.float()


class Tokenizer:
    context_length = 99

    def encode(self, prompt):
        return list(prompt)

    def __call__(self, prompts):
        return torch.tensor([[p.count("a"), p.count("b"), p.count("c")] for p in prompts])


@pytest.fixture
def model():
    return AlignmentModel(Network(), Tokenizer(), PREPROCESSING)


def images(size=4, **changed):
    """Red and green ones, the first with a pixel that is ``bad``."""
    made = torch.zeros(2, 3, size, size)
    made[0, 0], made[1, 1] = 1.0, 1.0
    if changed:
        made[0, 0, 0, 0] = changed["bad"]
    return made


@pytest.mark.parametrize("size", [4, 9])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_pixel_that_is_not_finite_costs_its_own_image_alone(model, bad, size):
    features = model.image_features(images(size, bad=bad))
    assert features[0].isnan().all()
    assert torch.equal(features[1], model.image_features(images(size))[1])
    assert finite(features).tolist() == [False, True]
    assert model.scores_of(model.image_features(images(size, bad=bad)), ["b", "b"]).isnan().tolist() == [
        True,
        False,
    ]
    assert model.scores_of(features, ["b", "b"])[1] == 1
    with pytest.raises(ValueError, match="1 of 2 images have features of no class"):
        classify_features(features, model, ["a", "b"], "{}")


def test_no_direction_has_no_similarity(model):
    """A black image before the network's mean, or a text of none of its letters, gives zero features."""
    features = model.image_features(torch.stack([torch.zeros(3, 4, 4), images()[1]]))
    assert not features[0].any()
    assert model.scores_of(features, ["b", "b"]).isnan().tolist() == [True, False]
    assert similarity(features, model.text_features(["a", "x"])).isnan().all()
    with pytest.raises(ValueError, match="1 of 2 images have features of no class"):
        classify_features(features, model, ["a", "b"], "{}")


def test_blank_images_of_one_colour_have_scores(model):
    assert model.scores_of(model.image_features(images()), ["a", "a"]).tolist() == [1, 0]
    assert classify_features(model.image_features(images()), model, ["a", "b"], "{}").tolist() == [0, 1]


def context(*positions):
    return Prompted(torch.tensor(positions), torch.zeros(2, 1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_reward_of_a_bad_latent_or_image_is_nan(model, bad):
    reward = ClipReward(lambda x: x.clamp(-1, 1), model, ["a", "b"])
    assert reward.value(images(bad=bad), context(0, 1)).isnan().tolist() == [True, False]
    broken = ClipReward(lambda x: x + torch.tensor([bad, 0.0])[:, None, None, None], model, ["a", "b"])
    assert broken.value(images(), context(0, 1)).isnan().tolist() == [True, False]
    with pytest.raises(RewardError, match="is not finite on 1 of 2 samples"):
        broken(images(), context(0, 1))


def test_an_image_reward_of_a_bad_image_is_nan():
    """Although an infinite pixel becomes a bright one where images are made to fit its network."""

    class Preference(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def score_gard(self, ids, mask, images):
            return images.mean((1, 2, 3))[:, None]

    reward = ImageReward.__new__(ImageReward)
    reward.decode, reward.prompts, reward.network = (lambda x: x), ("a", "b"), Preference()
    reward.ids = reward.mask = torch.zeros(2, 1, dtype=torch.long)
    for bad in (NAN, INF, -INF):
        assert reward.value(images(bad=bad), context(0, 1)).isnan().tolist() == [True, False]


REFUSED = [
    (fit, (torch.zeros(1, 3, 0, 4), 4), "cannot be made to fit"),
    (fit, (torch.zeros(1, 3, 4, 4), 0), "cannot be made to fit"),
    *(
        (lambda model, x: model.image_features(x), (x,), "expected images")
        for x in (torch.zeros(0, 3, 4, 4), torch.zeros(1, 3, 4, 0), torch.zeros(1, 1, 4, 4), torch.zeros(3))
    ),
    (lambda model: model.text_features([]), (), "at least one text"),
    (
        lambda model: model.scores_of(model.image_features(images()), ["a"]),
        (),
        "each image needs its prompt; got 2 and 1",
    ),
    (lambda model: model.scores_of(torch.zeros(0, 3), []), (), "at least one text"),
    (
        lambda model: classify_features(model.image_features(images()), model, [], "{}"),
        (),
        "without names",
    ),
    (lambda model: classify_features(model.image_features(images()), model, ["a"], "a"), (), "has no {}"),
    (lambda model: ClipReward(lambda x: x, model, []), (), "at least one text"),
    *(
        (lambda model, c: ClipReward(lambda x: x, model, ["a", "b"]).value(images(), c), (c,), message)
        for c, message in (
            (None, "needs the prompts"),
            (context(0), "a prompt a sample"),
            (context(0, 2), "at position 2"),
            (context(0, -1), "at position -1"),
        )
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_degenerate_input_is_refused(model, function, arguments, message):
    takes_model = "model" in inspect.signature(function).parameters
    with pytest.raises(ValueError, match=message):
        function(*((model,) if takes_model else ()), *arguments)


def test_no_prompt_is_too_long_for_a_warning_of_its_length(caplog):
    warn_of_long([], len, 1)
    warn_of_long(["a", ""], len, 1)
    assert not caplog.messages
    warn_of_long(["ab", "ab"], len, 1, "text encoder")
    assert caplog.messages == ["prompt 'ab' has 2 tokens; the text encoder sees 1 of them"]


def test_every_public_function_is_tried_here():
    """Loading has tests of its own, of files that are not there or damaged."""
    tried = {id(value) for value in (*globals().values(), load_alignment)}
    for module in (alignment, rewards):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert id(function) in tried, name
