import pytest
import torch

from closed_forms import generator
from flowtilt.domains.molecules.sections import UnitsConfig
from flowtilt.domains.molecules.states import ELEMENTS, WIDTH, centred, pack, unpack

MASK = torch.arange(5) < torch.tensor([3, 5, 1])[:, None]


def molecules():
    rng = generator(0)
    coordinates = torch.randn(3, 5, 3, generator=rng, dtype=torch.float64)
    return coordinates, torch.randint(len(ELEMENTS), (3, 5), generator=rng)


@pytest.mark.parametrize("units", [UnitsConfig(), UnitsConfig(length=2.0, type_scale=0.25)])
def test_what_is_packed_comes_back_about_its_centre_of_mass(units):
    coordinates, types = molecules()
    x = pack(coordinates, types, MASK, units)
    assert x.shape == (3, 5, WIDTH)
    assert bool((x[~MASK] == 0).all())
    torch.testing.assert_close(x[..., 3:].sum(2), units.type_scale * MASK.double())
    again, same_types = unpack(x, MASK, units)
    torch.testing.assert_close(same_types, types * MASK)
    for i in range(3):
        own = coordinates[i, MASK[i]]
        torch.testing.assert_close(again[i, MASK[i]], own - own.mean(0))


def test_padding_has_no_part_in_the_centre_of_mass():
    coordinates, _ = molecules()
    moved = torch.where(MASK.unsqueeze(2), coordinates, 100.0)
    torch.testing.assert_close(centred(coordinates, MASK), centred(moved, MASK), rtol=0, atol=1e-14)


@pytest.mark.parametrize("units", [{"length": 0.0}, {"type_scale": -1.0}])
def test_units_must_be_positive(units):
    with pytest.raises(ValueError, match=rf"{next(iter(units))}\n.*greater than 0"):
        UnitsConfig(**units)
