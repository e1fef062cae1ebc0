import math

import numpy as np
import pytest

from flowtilt.domains.molecules.assessment import (
    assess,
    assess_relaxation,
    composition,
    drift,
    total_variation,
)
from flowtilt.domains.molecules.chemistry import Invalid, Structure
from flowtilt.domains.molecules.relaxation import Relaxed
from flowtilt.domains.molecules.xtb import Failure, Molecule


def molecule(*numbers):
    return Molecule(np.array(numbers, dtype=int), np.zeros((len(numbers), 3)))


METHANE, WATER, CARBON_MONOXIDE = molecule(6, 1, 1, 1, 1), molecule(8, 1, 1), molecule(6, 8)
MOLECULES = [METHANE, METHANE, WATER, CARBON_MONOXIDE, WATER]
REWARDS = np.array([4.0, 5.0, 6.0, math.nan, 9.0])
FAILURES = [None, None, None, Failure.NOT_CONVERGED, None]
STRUCTURES = [
    Structure("C"),
    Structure("C"),
    Structure("O"),
    Structure("[C-]#[O+]"),
    Structure(None, invalid=Invalid.FRAGMENTS),
]
REFERENCE = composition([METHANE, WATER])


@pytest.fixture
def metrics():
    return assess(MOLECULES, REWARDS, FAILURES, STRUCTURES, frozenset({"C"}), REFERENCE)


def test_every_metric_by_hand(metrics):
    expected = {
        "molecules": 5,
        "reward_molecules": 4,
        "reward_mean": 6.0,
        "reward_best_10_percent": 9.0,
        "reward_best_0.2_percent": 9.0,
        "valid_reward_molecules": 3,
        "valid_reward_mean": 5.0,
        "valid_reward_best_10_percent": 6.0,
        "valid_reward_best_0.2_percent": 6.0,
        "energy_per_atom": -(4 / 5 + 5 / 5 + 6 / 3 + 9 / 3) / 4,
        "converged": 4 / 5,
        "validity": 4 / 5,
        "uniqueness": 3 / 4,
        "uniqueness_of_1000": 3 / 4,
        "novelty": 2 / 3,
        "failed_not_converged": 1,
        "invalid_fragments": 1,
        # 18 atoms: 12 H, 3 C, 3 O, of 8 in the reference: 6 H, 1 C, 1 O
        "elements_total_variation": 0.5 * (abs(12 / 18 - 6 / 8) + 2 * abs(3 / 18 - 1 / 8)),
        "sizes_total_variation": 0.5 * (abs(2 / 5 - 1 / 2) + abs(2 / 5 - 1 / 2) + 1 / 5),
        "heavy_atoms": 6 / 5,
        "heavy_atoms_reference": 1.0,
        "atomic_number": (12 + 18 + 24) / 18,
        "atomic_number_reference": (6 + 6 + 8) / 8,
    }
    # Unknown elements are counted where there are some; see test_degenerate.py.
    counts = {f"failed_{reason.name.lower()}": 0 for reason in Failure if reason is not Failure.ELEMENT}
    counts |= {f"invalid_{reason.name.lower()}": 0 for reason in Invalid if reason is not Invalid.ELEMENT}
    assert metrics == pytest.approx(counts | expected)


def test_tails_count_the_boundary_sample_fractionally():
    rewards = np.arange(25.0)
    found = assess([WATER] * 25, rewards, [None] * 25, [Structure("O")] * 25, frozenset(), REFERENCE)
    assert found["reward_best_10_percent"] == pytest.approx((24 + 23 + 0.5 * 22) / 2.5)


def test_nothing_that_converged_is_nan_with_counts():
    lost = [Failure.TOO_CLOSE] * 5
    found = assess(MOLECULES, np.full(5, math.nan), lost, STRUCTURES, frozenset(), REFERENCE)
    assert found["failed_too_close"] == 5
    assert found["reward_molecules"] == 0
    nan = {name for name, value in found.items() if math.isnan(value)}
    tails = {f"{kind}_{tail}" for kind in ("reward", "valid_reward") for tail in TAILS}
    assert nan == tails | {"energy_per_atom"}


TAILS = ("mean", "best_10_percent", "best_0.2_percent")


def test_nothing_valid_is_nan_with_counts():
    invalid = [Structure(None, invalid=Invalid.RADICAL)] * 5
    found = assess(MOLECULES, REWARDS, FAILURES, invalid, frozenset(), REFERENCE)
    assert found["validity"] == 0
    assert found["invalid_radical"] == 5
    nan = {name for name, value in found.items() if math.isnan(value)}
    assert nan == {f"valid_reward_{tail}" for tail in TAILS} | {"uniqueness", "uniqueness_of_1000", "novelty"}


@pytest.mark.parametrize(
    ("rewards", "failures", "message"),
    [
        (REWARDS[:4], FAILURES, r"one of each .* got \[4, 5\]"),
        (REWARDS, [None] * 5, "either a finite reward or a failure"),
        (REWARDS, [Failure.TIME, *FAILURES[1:]], "either a finite reward or a failure"),
        (np.array([4.0, 5.0, 6.0, math.inf, 9.0]), [None] * 5, "either a finite reward or a failure"),
    ],
)
def test_arrays_that_disagree_are_refused(rewards, failures, message):
    with pytest.raises(ValueError, match=message):
        assess(MOLECULES, rewards, failures, STRUCTURES, frozenset(), REFERENCE)


def test_no_molecules_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        assess([], np.array([]), [], [], frozenset(), REFERENCE)
    with pytest.raises(ValueError, match="at least one atom"):
        composition([molecule()])


def test_a_set_has_not_drifted_from_itself():
    found = drift(MOLECULES, composition(MOLECULES))
    assert found["elements_total_variation"] == found["sizes_total_variation"] == 0
    assert found["heavy_atoms"] == found["heavy_atoms_reference"]


def test_total_variation_of_disjoint_distributions_is_one():
    assert total_variation({1: 0.5, 6: 0.5}, {7: 1.0}) == 1
    assert total_variation({1: 0.5, 6: 0.5}, {1: 0.25, 6: 0.75}) == 0.25


def test_relaxations_are_summarised_over_those_that_converged():
    def relaxed(gain, converged):
        return Relaxed(gain, np.zeros((1, 3)), converged, 10)

    found = assess_relaxation(
        [relaxed(0.1, True), relaxed(0.2, True), relaxed(0.6, True), relaxed(9.0, False)]
    )
    assert found == {
        "relaxed_molecules": 4,
        "relaxed_converged": 0.75,
        "relaxation_energy_mean": pytest.approx(0.3),
        "relaxation_energy_median": pytest.approx(0.2),
    }
    none = assess_relaxation([])
    assert none["relaxed_molecules"] == 0
    assert all(math.isnan(none[name]) for name in none if name != "relaxed_molecules")
