import dataclasses
import math

import pytest
import torch

from closed_forms import generator, tensor
from flowtilt.domains.planar.landscapes import LANDSCAPES, Rings, Spikes, Stripes

FIELDS = {
    "left": 80.0,
    "plateau": 100.0,
    "right": 20.0,
    "bump": 290.0,
    "left_edge": -2.0,
    "right_edge": 2.0,
    "softness": 0.2,
    "width": 0.05,
    "spacing": 0.8,
    "inset": 0.4,
}
STRIPES, SPIKES = Stripes(**FIELDS), Spikes(**FIELDS)
both = pytest.mark.parametrize("landscape", [STRIPES, SPIKES], ids=["stripes", "spikes"])


def at(*points):
    return tensor(points)


@both
def test_zones_have_their_heights_away_from_edges_and_bumps(landscape):
    points = at([-4.0, 0.3], [0.0, -1.0], [2.8, 0.4], [4.4, -2.0])
    # Three half-widths beyond an edge the transition has 6e-6 of its way to go.
    torch.testing.assert_close(landscape.height(points), tensor([80.0, 100.0, 20.0, 20.0]), rtol=0, atol=1e-3)


@both
def test_transitions_are_half_way_at_their_edges_and_almost_done_a_half_width_away(landscape):
    """At the right edge the bumps of the first column, four half-widths and more away, are gone."""
    middle = landscape.height(at([-2.0, 0.4], [2.0, 0.4]))
    torch.testing.assert_close(middle, tensor([90.0, 60.0]), rtol=0, atol=1e-6)
    rise = (landscape.height(at([-1.8, 0.4])) - 80) / 20
    assert float(rise) == pytest.approx(1 / (1 + math.exp(-4)), abs=1e-6)


def test_stripes_run_along_y_at_even_distances_right_of_the_edge():
    assert STRIPES.first_column == 2.4
    for column in (2.4, 3.2, 4.0, 6.4):
        for y in (-3.0, 0.0, 0.123):
            assert float(STRIPES.height(at([column, y]))) == pytest.approx(290.0, abs=1e-9)
            # A half-width from the crest, exp(-1) of the bump is left.
            profile = STRIPES.bumps(at([column - 0.05, y], [column + 0.05, y], [column + 0.1, y]))
            torch.testing.assert_close(profile, tensor([1.0, 1.0, math.exp(-15)]) * math.exp(-1))
    left = at([2.4 - 0.8, 0.0], [-2.4, 0.0], [0.0, 0.0])
    assert torch.equal(STRIPES.bumps(left), torch.zeros(3).double())


def test_spikes_stand_on_a_square_lattice_through_their_row():
    for landscape, row in ((SPIKES, 0.0), (dataclasses.replace(SPIKES, row=0.35), 0.35)):
        for point in ([2.4, row], [3.2, row + 0.8], [4.0, row - 1.6]):
            assert float(landscape.bumps(at(point))) == pytest.approx(1.0, abs=1e-9)
            x, y = point
            ring = [[x + 0.05 * math.cos(a), y + 0.05 * math.sin(a)] for a in (0.0, 1.0, 2.5, 4.0)]
            torch.testing.assert_close(landscape.bumps(at(*ring)), torch.full((4,), math.exp(-1)).double())
        assert float(landscape.bumps(at([2.4, row + 0.4]))) < 1e-12
        assert float(landscape.bumps(at([1.6, row]))) == 0


@both
def test_costs_are_minus_the_height(landscape):
    points = 3 * torch.randn(100, 2, generator=generator(0), dtype=torch.float64)
    cost = dataclasses.replace(landscape, sign=-1)
    assert torch.equal(cost(points), -landscape.height(points))
    assert torch.equal(landscape(points), landscape.height(points))


@both
def test_gradients_are_finite_and_agree_with_central_differences(landscape):
    rng, h = generator(0), 1e-6
    points = tensor([4.0, 2.0]) * torch.randn(300, 2, generator=rng, dtype=torch.float64)
    on_flanks = at([2.35, 0.02], [2.42, 0.04], [3.23, 0.03], [2.0, 0.0], [-2.0, 1.0])
    points = torch.cat([points, on_flanks])
    gradient = landscape.gradient(points)
    assert bool(torch.isfinite(gradient).all())
    for axis, step in enumerate(torch.eye(2, dtype=torch.float64) * h):
        difference = (landscape(points + step) - landscape(points - step)) / (2 * h)
        # Rounding: 290 * 1e-16 / 1e-6; truncation: third derivatives of 270 / 0.05^3 times 1e-12.
        torch.testing.assert_close(gradient[:, axis], difference, rtol=1e-5, atol=1e-4)


@both
def test_single_precision_is_enough_for_rewards_and_gradients(landscape):
    points = 3 * torch.randn(200, 2, generator=generator(1), dtype=torch.float64)
    single = points.float()
    torch.testing.assert_close(landscape(single).double(), landscape(single.double()), rtol=0, atol=0.05)
    assert landscape.gradient(single).dtype == torch.float32


def test_the_registry_names_both():
    assert dict(LANDSCAPES) == {"stripes": Stripes, "spikes": Spikes}


# ------------------------------------------------------------------------------------- rings


def test_rings_are_one_less_the_squared_distance_to_the_nearest_by_brute_force():
    rings = Rings(centres=((-1.0, 0.0), (1.2, 0.5)), radius=0.7)
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    around = torch.cat([tensor(centre) + 0.7 * circle for centre in rings.centres])
    points = 2 * torch.randn(200, 2, generator=generator(0), dtype=torch.float64)
    nearest = torch.cdist(points, around).amin(dim=1)
    torch.testing.assert_close(rings(points), 1 - nearest**2, rtol=0, atol=1e-6)
    # At a centre every direction is as good: the gradient is finite there.
    at_centre = tensor([[-1.0, 0.0]]).requires_grad_()
    rings.value(at_centre).sum().backward()
    assert at_centre.grad.isfinite().all()
