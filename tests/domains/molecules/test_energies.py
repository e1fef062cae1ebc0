import logging

import numpy as np
import pytest
import torch

import xtb_program
from flowtilt.domains.molecules.energies import XTBReward, attach, evaluate, molecules_of
from flowtilt.domains.molecules.workers import WorkerPool
from flowtilt.domains.molecules.xtb import Failure, Molecule, XTBSettings, single_point
from flowtilt.functionals.base import Distribution
from flowtilt.functionals.utilities import SQ, ExpectedReward, Hinge, RewardVariation
from flowtilt.rewards import RewardError

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")

SMALL = [case for case in xtb_program.stored() if case.energy is not None and case.charge == 0][:10]
ATOMS = max(len(case.numbers) for case in SMALL) + 2


def padded(cases, atoms=ATOMS, front=0):
    """A batch with padding behind and, if asked for, in front; the padding's coordinates are not zero."""
    numbers = np.zeros((len(cases), atoms), dtype=np.int64)
    coordinates = np.full((len(cases), atoms, 3), 7.0)
    for row, case in enumerate(cases):
        held = slice(front, front + len(case.numbers))
        numbers[row, held], coordinates[row, held] = case.numbers, case.coordinates
    return coordinates, numbers


COLLIDING = xtb_program.Case("colliding", [8, 8], [[0, 0, 0], [0, 0, 0.1]])
STATES, KINDS = padded([*SMALL[:4], COLLIDING])


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def decode(x, context):
    """States in units of half an ångström."""
    return 0.5 * x, context


def states():
    return torch.from_numpy(STATES) / 0.5, torch.from_numpy(KINDS)


@pytest.mark.parametrize("front", [0, 2])
def test_padding_changes_nothing_and_has_no_gradient(pool, front):
    coordinates, numbers = padded(SMALL, front=front)
    found = evaluate(coordinates, numbers, pool=pool)
    np.testing.assert_allclose(found.energy, [case.energy for case in SMALL], atol=1e-6)
    assert not found.gradient[numbers == 0].any()
    for row, case in enumerate(SMALL):
        alone = single_point((Molecule(np.array(case.numbers), np.array(case.coordinates)), XTBSettings()))
        np.testing.assert_array_equal(found.gradient[row][numbers[row] > 0], alone.gradient)


def test_results_do_not_depend_on_the_number_of_workers_or_the_order(pool):
    coordinates, numbers = padded([*SMALL, COLLIDING])
    two = evaluate(coordinates, numbers, pool=pool)
    with WorkerPool(1) as single:
        one = evaluate(coordinates[::-1], numbers[::-1], pool=single)
    np.testing.assert_array_equal(one.energy[::-1], two.energy)
    np.testing.assert_array_equal(one.gradient[::-1], two.gradient)
    assert one.failures[::-1] == two.failures


def test_failures_are_explicit_and_counted(pool):
    found = evaluate(STATES, KINDS, pool=pool)
    assert found.failures == (None, None, None, None, Failure.TOO_CLOSE)
    assert found.counts() == {Failure.TOO_CLOSE: 1}
    assert np.isnan(found.energy).tolist() == [False, False, False, False, True]
    assert not found.gradient[4].any()


def test_a_time_limit_is_a_failure(pool):
    scattered = next(case for case in xtb_program.stored() if case.energy is None)
    settings = XTBSettings(max_iterations=2000, seconds=1.0)  # it would take several seconds
    found = evaluate(*padded([SMALL[0], scattered]), settings, pool)
    assert found.failures == (None, Failure.TIME)


def test_autograd_gives_the_gradient_of_energies_on_coordinates(pool):
    x = torch.from_numpy(STATES).requires_grad_(True)
    computed = evaluate(x.numpy(force=True), KINDS, pool=pool)
    values = attach(x, computed)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * values).nansum(), x)
    expected = weights[:, None, None] * torch.from_numpy(computed.gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert not gradient[4].any()
    torch.testing.assert_close(values.detach(), torch.from_numpy(computed.energy), equal_nan=True)


def test_the_reward_is_minus_the_energy_and_its_gradient_goes_through_the_decoder():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    values, gradient = reward(x, numbers), reward.gradient(x, numbers)
    assert not values.requires_grad
    np.testing.assert_allclose(values[:4], [-case.energy for case in SMALL[:4]], atol=1e-6)
    step = 1e-3
    for index in [(0, 0, 1), (3, 2, 0)]:
        shift = torch.zeros_like(x)
        shift[index] = step
        ahead, behind = (reward(x + s, numbers)[index[0]] for s in (shift, -shift))
        assert gradient[index] == pytest.approx(((ahead - behind) / (2 * step)).item(), abs=1e-5)


def test_separated_atoms_change_the_gradient_and_no_value():
    x, numbers = states()
    slopes = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = XTBReward(decode, workers=1)
    reward = XTBReward(decode, workers=1, separated=lambda x, context: (slopes * x).sum((1, 2)))
    torch.testing.assert_close(reward(x, numbers), plain(x, numbers), rtol=0, atol=0, equal_nan=True)
    gradient, expected = reward.gradient(x, numbers), plain.gradient(x, numbers) - slopes
    torch.testing.assert_close(gradient[:4], expected[:4], rtol=0, atol=1e-12)
    assert not gradient[4].any()  # of the molecule that has no energy


def test_a_failed_sample_has_reward_nan_and_gradient_zero():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    assert reward(x, numbers).isnan().tolist() == [False, False, False, False, True]
    gradient = reward.gradient(x, numbers)
    assert gradient.isfinite().all()
    assert [bool(row.any()) for row in gradient] == [True, True, True, True, False]


def test_a_hinge_is_inactive_where_the_reward_failed_and_computes_energies_once():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    hinge = Hinge(reward, 4.5, 0.5, "upper")
    assert hinge.active(x, numbers).tolist() == [False, True, True, True, False]
    gradient = hinge.gradient(x, numbers)
    torch.testing.assert_close(gradient[1:4], 2 * reward.gradient(x, numbers)[1:4])
    assert not gradient[[0, 4]].any()
    assert reward.evaluated == len(x)


def test_molecules_of_a_pool_are_not_computed_again_in_any_order():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    pool = reward(x, numbers)
    chosen = torch.tensor([3, 4, 0])
    torch.testing.assert_close(reward(x[chosen], numbers[chosen]), pool[chosen], equal_nan=True)
    part = reward.gradient(x[chosen], numbers[chosen])
    assert reward.evaluated == 5
    fresh = XTBReward(decode, workers=1)
    torch.testing.assert_close(part, fresh.gradient(x[chosen], numbers[chosen]))
    moved = x.clone()
    moved[1, 0, 0] += 0.01
    reward(moved, numbers)  # one is new: the others are known still
    assert reward.evaluated == 6
    reward(x, numbers)  # but what the last batch had not is forgotten
    assert reward.evaluated == 7


def test_the_reward_counts_what_it_evaluated_and_why_it_failed():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    reward(x, numbers)
    reward(x + 1.0, numbers)  # the same molecules elsewhere
    assert reward.evaluated == 10
    assert reward.failures == {Failure.TOO_CLOSE: 2}


def test_functionals_leave_failures_out():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    kept = -np.array([case.energy for case in SMALL[:4]])
    distribution = Distribution(None, x, numbers)
    assert ExpectedReward(reward).value(distribution) == pytest.approx(kept.mean(), abs=1e-6)
    hinge = SQ(reward, 0.4).linearise(distribution)
    assert hinge.threshold == pytest.approx(np.sort(kept)[2], abs=1e-6)
    assert not hinge.active(x, numbers)[4]
    assert RewardVariation(reward).active(x, numbers).tolist() == [True, True, True, True, False]
    with pytest.raises(RewardError, match="failed on all 5 samples of a distribution"):
        SQ(reward, 0.4).linearise(Distribution(None, 0.01 * x, numbers))


def test_a_batch_that_fails_as_a_whole_is_said_once_and_has_no_gradient(caplog):
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    with caplog.at_level(logging.WARNING):
        gradient = reward.gradient(0.01 * x, numbers)
    assert not gradient.any()
    assert [r.getMessage() for r in caplog.records] == [
        "all 5 molecules of a batch have no energy: atoms too close (5)"
    ]


def test_a_charge_that_no_molecule_can_have_is_a_counted_failure(pool):
    found = evaluate(STATES, KINDS, XTBSettings(charge=40), pool)
    assert found.counts() == {Failure.ELECTRONS: 4, Failure.TOO_CLOSE: 1}


def test_single_precision_states_keep_their_type():
    x, numbers = states()
    reward = XTBReward(decode, workers=1)
    values = reward(x.float(), numbers)
    assert values.dtype == torch.float32
    assert reward.gradient(x.float(), numbers).dtype == torch.float32
    np.testing.assert_allclose(values[:4], [-case.energy for case in SMALL[:4]], atol=1e-5)


def test_an_infinite_reward_is_still_an_error():
    class Infinite(XTBReward):
        def value(self, x, context=None):
            return x.flatten(1).sum(1) * torch.inf

    with pytest.raises(RewardError, match="not finite"):
        Infinite(decode)(states()[0])


@pytest.mark.parametrize(
    ("numbers", "shape", "message"),
    [
        (np.ones((2, 3)), (2, 4, 3), "got .2, 3. and .2, 4, 3."),
        (np.ones(3), (3, 3), "expected atomic numbers"),
        (np.array([[1, 119]]), (1, 2, 3), r"\[119\] are not atomic numbers, which go from 1 to 118"),
        (np.array([[1, -6]]), (1, 2, 3), r"\[-6\] are not atomic numbers"),
    ],
)
def test_arrays_that_are_no_batch_of_molecules_are_refused(numbers, shape, message):
    with pytest.raises(ValueError, match=message):
        molecules_of(np.zeros(shape), numbers)


def test_an_empty_batch_is_empty(pool):
    found = evaluate(np.zeros((0, 4, 3)), np.zeros((0, 4), dtype=int), pool=pool)
    assert found.energy.shape == (0,)
    assert found.gradient.shape == (0, 4, 3)
