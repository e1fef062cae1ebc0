"""Images of bridges: their distribution, their captions, and whether the designs can be told apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from flowtilt.domains.images.bridges import (
    COLOURS,
    CREATIVE,
    DESIGNS,
    GENERIC,
    GENERIC_SHARE,
    MATERIALS,
    MOST_WORDS,
    PLAIN,
    PREFIXES,
    SCENERIES,
    TIMES,
    Bridge,
    bridge_set,
    caption,
    describe,
    draw_bridge,
    image,
)
from small_images import PROMPTS

DRAWS = 20_000
STANDARD_ERRORS = 4.5  # of a share; about 7 in a million for one comparison, and there are under 100
FACTORS = {"design": DESIGNS, "colour": COLOURS, "scenery": SCENERIES, "time": TIMES}


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Bridge], list[str]]:
    """Factors with their captions, without the images."""
    rng = np.random.default_rng(0)
    bridges = [draw_bridge(rng) for _ in range(DRAWS)]
    return bridges, [caption(bridge, rng) for bridge in bridges]


def _check_shares(values: list[str], shares: Mapping[str, float]) -> None:
    """The values have the given shares, within a multiple of their standard errors."""
    counts = Counter(values)
    assert set(counts) <= set(shares)
    for key, share in shares.items():
        error = math.sqrt(share * (1 - share) / len(values))
        assert abs(counts[key] / len(values) - share) <= STANDARD_ERRORS * error, key


@pytest.mark.parametrize(
    "shares",
    [DESIGNS, *MATERIALS.values(), COLOURS, SCENERIES, TIMES, PREFIXES]
    + [{text: pair[column] for text, pair in GENERIC.items()} for column in (0, 1)],
)
def test_tables_sum_to_one(shares: Mapping[str, float]) -> None:
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert min(shares.values()) >= 0


@pytest.mark.parametrize("factor", FACTORS)
def test_factors_follow_the_tables(drawn: tuple[list[Bridge], list[str]], factor: str) -> None:
    _check_shares([getattr(bridge, factor) for bridge in drawn[0]], FACTORS[factor])


@pytest.mark.parametrize("design", DESIGNS)
def test_materials_follow_the_table_of_the_design(drawn: tuple[list[Bridge], list[str]], design: str) -> None:
    materials = [bridge.material for bridge in drawn[0] if bridge.design == design]
    _check_shares(materials, MATERIALS[design])


def test_share_of_generic_captions(drawn: tuple[list[Bridge], list[str]]) -> None:
    kinds = ["generic" if text in GENERIC else "detailed" for text in drawn[1]]
    _check_shares(kinds, {"generic": GENERIC_SHARE, "detailed": 1 - GENERIC_SHARE})


def design_shares(text: str) -> dict[str, float]:
    """The distribution of designs given a generic caption, by Bayes' rule from the tables."""
    plain, other = GENERIC[text]
    joint = {design: share * (plain if design == PLAIN else other) for design, share in DESIGNS.items()}
    return {design: share / sum(joint.values()) for design, share in joint.items()}


@pytest.mark.parametrize("text", GENERIC)
def test_designs_given_a_generic_caption(drawn: tuple[list[Bridge], list[str]], text: str) -> None:
    designs = [bridge.design for bridge, said in zip(*drawn, strict=True) if said == text]
    assert len(designs) > 500
    _check_shares(designs, design_shares(text))


def test_half_of_the_creative_designs_are_plain() -> None:
    # By hand: 0.6 * 0.30 = 0.18 and 0.4 * 0.45 = 0.18; of the latter, an arch has 0.16 / 0.4.
    shares = design_shares(CREATIVE)
    assert shares[PLAIN] == pytest.approx(0.5)
    assert shares["arch"] == pytest.approx(0.2)
    assert sum(shares.values()) == pytest.approx(1)
    assert design_shares("a plain bridge design")[PLAIN] == 1


def test_captions_are_short_and_of_lower_case(drawn: tuple[list[Bridge], list[str]]) -> None:
    texts = set(drawn[1])
    assert max(len(text.split()) for text in texts) <= MOST_WORDS
    assert all(text == text.lower() for text in texts)
    assert any(text.startswith("a photo of an arch bridge") for text in texts)


def test_detailed_captions_say_what_is_there(drawn: tuple[list[Bridge], list[str]]) -> None:
    for bridge, text in zip(*drawn, strict=True):
        if text in GENERIC:
            continue
        said = set(text.split())
        present = {bridge.design, bridge.material, bridge.colour, bridge.scenery, bridge.time}
        known = set(FACTORS["design"]) | set(COLOURS) | set(SCENERIES) | set(TIMES)
        known |= {material for shares in MATERIALS.values() for material in shares}
        assert said & known <= present
        assert bridge.design in said


def test_complete_caption() -> None:
    nuisance = {"deck": 70.0, "centre": 64.0, "span": 80.0, "horizon": 86.0}
    chances = {"parts": 0.5, "variant": 0.5, "rise": 0.5}
    bridge = Bridge("suspension", "steel", "red", "river", "night", **nuisance, **chances)
    assert describe(bridge) == "a red steel suspension bridge over a river at night"


def test_prompts_are_complete_captions_and_balanced() -> None:
    known = {
        describe(Bridge(design, material, colour, scenery, time, 0, 0, 0, 0, 0, 0, 0)): (
            {"design": design, "colour": colour, "scenery": scenery, "time": time}
        )
        for design, shares in MATERIALS.items()
        for material in shares
        for colour in COLOURS
        for scenery in SCENERIES
        for time in TIMES
    }
    assert len(set(PROMPTS)) == len(PROMPTS) == 20
    assert max(len(prompt.split()) for prompt in PROMPTS) <= 10
    for factor, shares in FACTORS.items():
        counts = Counter(known[prompt][factor] for prompt in PROMPTS)
        even = len(PROMPTS) / len(shares)
        assert all(abs(counts[key] - even) < 1.5 for key in shares), counts


def test_items_depend_on_the_seed_and_their_number_only() -> None:
    few, many, other = bridge_set(4, 3), bridge_set(9, 3), bridge_set(4, 4)
    np.testing.assert_array_equal(few.images, many.images[:4])
    assert few.captions == many.captions[:4]
    assert few.bridges == many.bridges[:4]
    assert few.bridges != other.bridges
    assert len({image.tobytes() for image in many.images}) == 9


@pytest.mark.parametrize("size", [8, 24, 32, 64])
def test_sizes(size: int) -> None:
    made = bridge_set(3, 0, size)
    assert made.images.shape == (3, size, size, 3)
    assert made.images.dtype == np.uint8
    assert made.captions == bridge_set(3, 0).captions


def test_larger_images_show_the_same() -> None:
    small, large = (bridge_set(40, 1, size).images.astype(float) for size in (32, 64))
    reduced = large.reshape(40, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(reduced - small).mean() < 6  # of 255: widths are rounded to whole pixels


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (0, 32, "count must be at least 1"),
        (-1, 32, "count"),
        (1, 30, "multiple of 8"),
        (1, 0, "multiple of 8"),
    ],
)
def test_impossible_sets(count: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bridge_set(count, 0, size)


def test_impossible_requests() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        image(draw_bridge(rng), rng, size=12)


def _balanced_accuracy(factor: str, bridges: list[Bridge], features: np.ndarray) -> float:
    """Mean over values of the share that ridge regression gets right on the second half."""
    values = list(FACTORS[factor])
    labels = np.array([values.index(getattr(bridge, factor)) for bridge in bridges])
    half = len(labels) // 2
    features = features.reshape(len(labels), -1)
    features = features - features[:half].mean(0)
    targets = np.eye(len(values))[labels] - 1 / len(values)
    train = features[:half]
    weights = train.T @ np.linalg.solve(train @ train.T + 30 * np.eye(half), targets[:half])
    right = (features[half:] @ weights).argmax(1) == labels[half:]
    return float(np.mean([right[labels[half:] == value].mean() for value in range(len(values))]))


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Absolute differences of neighbouring pixels, which do not mind whether a bridge is dark or light."""
    down = np.abs(np.diff(pixels, axis=1))[:, :, :-1]
    across = np.abs(np.diff(pixels, axis=2))[:, :-1]
    return np.concatenate([down, across], axis=-1)


@pytest.fixture(scope="module")
def balanced() -> tuple[list[Bridge], np.ndarray]:
    """Images (in [0, 1]) with each design equally often; all else follows the distribution."""
    rng = np.random.default_rng(7)
    wanted = dict.fromkeys(DESIGNS, 480)
    bridges = []
    while sum(wanted.values()):
        bridge = draw_bridge(rng)
        if wanted[bridge.design]:
            wanted[bridge.design] -= 1
            bridges.append(bridge)
    order = rng.permutation(len(bridges))  # the rare designs come last
    bridges = [bridges[number] for number in order]
    return bridges, np.stack([image(bridge, rng) for bridge in bridges]) / 255


@pytest.mark.slow
def test_a_linear_classifier_of_edges_tells_designs_apart(
    balanced: tuple[list[Bridge], np.ndarray],
) -> None:
    bridges, pixels = balanced
    assert _balanced_accuracy("design", bridges, _edges(pixels)) >= 0.97


@pytest.mark.parametrize(
    ("factor", "least"), [("design", 0.80), ("colour", 0.75), ("scenery", 0.95), ("time", 0.98)]
)
def test_a_linear_classifier_of_pixels_tells_factors_apart(
    balanced: tuple[list[Bridge], np.ndarray], factor: str, least: float
) -> None:
    assert _balanced_accuracy(factor, *balanced) >= least
