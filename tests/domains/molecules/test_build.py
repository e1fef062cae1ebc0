import json

import numpy as np
import pytest
import torch

from flowtilt.checkpoints import load_weights
from flowtilt.domains.molecules import data
from flowtilt.domains.molecules.build import (
    build_model,
    decoder,
    padded,
    pretrain,
    separated_atoms,
    type_shares,
)
from flowtilt.domains.molecules.sections import MoleculeConfig, UnitsConfig
from flowtilt.domains.molecules.states import pack
from flowtilt.domains.molecules.xtb import atomic_energy
from flowtilt.pipeline.configuration import ConfigError, validated
from flowtilt.resuming import Resumption
from flowtilt.sampling import sample_sde

CONFIG = {
    "name": "made_up",
    "subset": {"largest": 5},
    "units": {"type_scale": 0.3},
    "network": {"layers": 1, "width": 8, "vectors": 4, "pair_width": 4, "heads": 2, "radial": 4},
    "pretrain": {"updates": 6, "batch": 4, "bfloat16": False},
}


@pytest.fixture
def molecules(tmp_path):
    """A file of made-up molecules of 3, 4 and 6 atoms."""
    rng = np.random.default_rng(0)
    records = [
        data.Record(i, "C", rng.integers(5, size=n), rng.normal(size=(n, 3)))
        for i, n in enumerate([3, 4, 6, 4, 3, 4] * 10)
    ]
    path = tmp_path / "molecules.npz"
    whole = data.gather(records)
    np.savez_compressed(path, **{name: getattr(whole, name) for name in data.FIELDS})
    return path


def slot(folder, name):
    return Resumption(folder / "state", "a training", seconds=0).slot(name)


def test_pretraining_from_a_configuration_goes_on_where_it_was(molecules, tmp_path):
    config = MoleculeConfig.model_validate(CONFIG)

    def stop(row):
        if row["update"] == 2:
            raise KeyboardInterrupt

    whole = pretrain(config, molecules, 0, tmp_path / "a.safetensors", slot(tmp_path, "a"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, molecules, 0, tmp_path / "b.safetensors", slot(tmp_path, "b"), stop)
    assert not (tmp_path / "b.safetensors").exists()
    again = pretrain(config, molecules, 0, tmp_path / "b.safetensors", slot(tmp_path, "b"))
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_checkpoint_has_all_that_sampling_needs(molecules, tmp_path):
    config = MoleculeConfig.model_validate(CONFIG)
    pretrain(config, molecules, 0, tmp_path / "a.safetensors", slot(tmp_path, "a"))
    flow = load_weights(build_model(config), tmp_path / "a.safetensors")
    # Of the whole subset: molecules of six atoms are not in it, and none has five.
    assert flow.size_weights.tolist() == [0, 0, 0, 20, 30, 0]
    generator = torch.Generator().manual_seed(0)
    mask = flow.draw_context(5, generator)
    x = sample_sde(flow, 5, 4, generator, mask)[-1]
    assert x.shape == (5, 5, 8)
    assert bool(torch.isfinite(x).all())


def test_weights_follow_from_name_and_seed():
    config = MoleculeConfig.model_validate(CONFIG)
    other = MoleculeConfig.model_validate(CONFIG | {"name": "other"})
    first, same, seed, name = (
        model.network.embed.weight
        for model in (
            build_model(config, seed=1),
            build_model(config, seed=1),
            build_model(config, seed=2),
            build_model(other, seed=1),
        )
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, seed)
    assert not torch.equal(first, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"subset": {"smallest": 9, "largest": 5}},
            r"subset: smallest \(9\) must not be above largest \(5\)",
        ),
        ({"network": {"width": 9}}, r"network: width \(9\) must be a multiple of heads \(8\)"),
        ({"units": {"length": 0}}, r"units\.length: .* greater than 0"),
        ({"pretrain": {"updates": 5, "average": 1.0}}, r"pretrain\.average: .* less than 1"),
    ],
)
def test_errors_name_the_file_the_key_and_the_fix(tmp_path, change, message):
    with pytest.raises(ConfigError, match=r"some\.yaml: key " + message):
        validated(MoleculeConfig, json.loads(json.dumps(CONFIG | change)), tmp_path / "some.yaml")


def test_decoded_states_are_the_molecules_that_were_packed(molecules):
    config = MoleculeConfig.model_validate(CONFIG)
    chosen = data.load(molecules).of_size(3, 5)
    source = data.MoleculeSource(chosen, config.units)
    x, numbers = decoder(config.units)(source.states, source.mask)
    # The source sorts by size, and puts centres of mass at zero.
    ordered = sorted(chosen.as_molecules(), key=lambda molecule: len(molecule.numbers))
    expected_x, expected_numbers = padded(ordered)
    assert torch.equal(numbers, expected_numbers)
    centre = (expected_x * source.mask.unsqueeze(2)).sum(1) / source.mask.sum(1, keepdim=True)
    expected_x = (expected_x - centre.unsqueeze(1)) * source.mask.unsqueeze(2)
    torch.testing.assert_close(x, expected_x, atol=1e-5, rtol=0)


def test_a_type_column_has_no_gradient_of_what_is_decoded():
    config = MoleculeConfig.model_validate(CONFIG)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    coordinates, _ = decoder(config.units)(x, torch.ones(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(coordinates.square().sum(), x)
    assert bool(gradient[..., :3].all())
    assert not gradient[..., 3:].any()


def test_separated_atoms_have_their_energy_as_a_linear_function_of_the_types():
    """Exact differences between molecules of one size: a molecule of other elements, or halfway to it."""
    pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
    units, mask = UnitsConfig(), torch.tensor([[True, True, True, False]])
    energy = separated_atoms(type_shares(units), workers=1)

    def state(*types):
        return pack(torch.randn(1, 4, 3).double(), torch.tensor([[*types, 0]]), mask, units)

    one, other = state(0, 1, 3), state(0, 2, 4)  # HCO and HNF
    numbers = {"C": 6, "N": 7, "O": 8, "F": 9}
    c, n, o, f = (atomic_energy(numbers[name]) for name in "CNOF")
    change = float(energy(other, mask) - energy(one, mask))
    assert change == pytest.approx(n + f - c - o, abs=1e-9)
    assert float(energy((one + other) / 2, mask) - energy(one, mask)) == pytest.approx(change / 2, abs=1e-9)
    # Oxygen in place of carbon: two hartree, by which the data's energies follow their composition.
    assert o - c == pytest.approx(-2.5, abs=0.5)
