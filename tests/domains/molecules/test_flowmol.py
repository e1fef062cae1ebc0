"""FlowMol as a base model, with a stand-in for its package (see :mod:`flowmol_stand_in`)."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import flowmol_stand_in
from closed_forms import generator
from flowtilt.checkpoints import CheckpointError, save_tensors, save_weights, sha256_of
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.domains.molecules.flowmol import Description, FlowMolError, Layout
from flowtilt.domains.molecules.flowmol_weights import convert_pretrained, describe, load_flowmol
from flowtilt.domains.molecules.states import ATOMIC_NUMBERS
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.interpolants import Cosine, Linear
from flowtilt.rewards import Reward
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde

NAME = "qm9_gaussian"


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    flowmol_stand_in.install(monkeypatch)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "models" / "qm9_gaussian.safetensors"
    convert_pretrained(NAME, path)
    return path


@pytest.fixture
def loaded(weights):
    return load_flowmol(NAME, weights)


def states(flow, sizes, seed=0):
    """Masks of molecules of given sizes, and states that are noise."""
    mask = torch.arange(flow.layout.atoms) < torch.tensor(sizes)[:, None]
    return flow.prior(len(sizes), generator(seed), mask), mask


# --- Weights ---------------------------------------------------------------------------------------


def test_converted_weights_are_those_of_the_model_with_its_sizes_and_a_record(weights, loaded):
    flow, *_ = loaded
    real = flowmol_stand_in.load_pretrained(NAME).vector_field.state_dict()
    assert flow.vector_field.state_dict().keys() == real.keys()
    for name, tensor in real.items():
        assert torch.equal(flow.vector_field.state_dict()[name], tensor)
    assert flow.size_weights.tolist() == pytest.approx([0, 0, 0.2, 0.3, 0, 0.5])
    assert not any(parameter.requires_grad for parameter in flow.parameters())
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["sha256"] == sha256_of(weights)
    assert record["parameters"] == sum(p.numel() for p in flow.parameters())


def test_fine_tuned_weights_are_loaded_from_their_file_alone(loaded, tmp_path):
    flow, *_ = loaded
    with torch.no_grad():
        next(flow.parameters()).add_(1)
    save_weights(flow, tmp_path / "tuned.safetensors")
    again, *_ = load_flowmol(NAME, tmp_path / "tuned.safetensors", time_power=2.0)
    assert torch.equal(next(again.parameters()), next(flow.parameters()))
    assert again.time_power == 2


def test_a_description_survives_its_encoding():
    description = describe(NAME, flowmol_stand_in.load_pretrained(NAME))
    again = Description.decoded(description.encoded())
    assert again.encoded().tolist() == description.encoded().tolist()
    assert again.elements == ("C", "H", "N", "O", "F")
    assert again.schedules["e"] == ["cosine", 1.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qm9_ctmc", ("kind ctmc", "no Gaussian path")),
        ("qm9_dirichlet", ("kind dirichlet", "no Gaussian path")),
        ("qm9_simplexflow", ("feature a from marginal", "standard normal noise")),
        ("geom_gaussian", ("elements P, S, Cl, Br, I", "H, C, N, O, F")),
        ("qm9", ("FlowMol cannot load 'qm9'", "Supported models")),
    ],
)
def test_models_of_other_kinds_are_refused_when_they_are_converted(name, words, tmp_path):
    with pytest.raises(FlowMolError, match=r"key model\.name") as error:
        convert_pretrained(name, tmp_path / "no.safetensors")
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedules": {"x": ("exp", 0.0)}}, "schedule exp"),
        ({"schedules": {"a": ("cosine", 0.5)}}, "nu of at least that of the coordinates"),
        ({"schedules": {"x": ("linear", 0.0)}}, "that of its coordinates is linear"),
        (
            {"priors": {"x": ("centered-normal", {"std": 4.0})}},
            "feature x from centered-normal with {'std': 4.0}",
        ),
        ({"priors": {"e": ("gaussian", {"simplex_center": True})}}, "feature e from gaussian"),
        ({"priors": {"x": ("centered-normal", {})}}, "feature x from centered-normal"),  # FlowMol's is then 4
    ],
)
def test_other_schedules_and_noise_are_refused(change, words):
    description = describe(NAME, flowmol_stand_in.load_pretrained(NAME))
    (key, own), *_ = change.items()
    with pytest.raises(FlowMolError) as error:
        replace(description, **{key: {**getattr(description, key), **own}}).check()
    assert words in str(error.value)


def test_a_model_without_charges_is_refused():
    description = describe(NAME, flowmol_stand_in.load_pretrained(NAME))
    without = {feature: description.schedules[feature] for feature in "xae"}
    with pytest.raises(FlowMolError, match="has no feature c"):
        replace(description, schedules=without).check()


def test_schedules_are_told_in_the_time_of_the_coordinates():
    description = describe(NAME, flowmol_stand_in.load_pretrained(NAME))
    t = torch.tensor([0.2, 0.7])
    linear = replace(description, schedules=dict.fromkeys("xace", ("linear", 0.0)))
    linear.check()
    assert [linear.path_of(feature) for feature in "xace"] == [Linear()] * 4
    assert torch.equal(linear.own_time(t), t)
    assert [description.path_of(feature) for feature in "xe"] == [Linear(), Cosine(1.5)]
    faster = replace(description, schedules={**description.schedules, "x": ("cosine", 1.5)})
    assert [faster.path_of(feature) for feature in "xae"] == [Linear(), Cosine(2 / 1.5), Linear()]
    torch.testing.assert_close(torch.sin(math.pi / 2 * faster.own_time(t) ** 1.5) ** 2, t)


def test_bad_weights(weights, tmp_path):
    with pytest.raises(FlowMolError, match=r"'qm9_gaussian', where key model\.name is 'qm9_other'"):
        load_flowmol("qm9_other", weights)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_flowmol(NAME, tmp_path / "no.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_flowmol(NAME, cut)
    save_tensors({"other": torch.zeros(1)}, cut)
    with pytest.raises(CheckpointError, match="not converted weights of FlowMol"):
        load_flowmol(NAME, cut)


@pytest.mark.parametrize("module", ["flowmol", "flowmol.models.vector_field"])
def test_without_the_package(weights, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FlowMolError, match=r"key model\.kind is flowmol.*Dunni3/FlowMol.*equivariant"):
        load_flowmol(NAME, weights)


def test_a_version_with_another_network_is_named(weights, monkeypatch):
    module = sys.modules["flowmol.models.vector_field"]
    monkeypatch.setattr(module, "EndpointVectorField", lambda *, n_layers: None)
    with pytest.raises(FlowMolError, match="cannot be built by the installed FlowMol"):
        load_flowmol(NAME, weights)


# --- States ----------------------------------------------------------------------------------------


def test_a_layout_takes_features_apart_and_joins_them():
    layout = Layout(4, (3, 5, 6, 5))
    assert layout.sizes == [12, 20, 24, 30]
    assert layout.pairs.T.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    x = torch.randn(2, sum(layout.sizes))
    parts = layout.split(x)
    assert [tuple(part.shape) for part in parts] == [(2, 4, 3), (2, 4, 5), (2, 4, 6), (2, 6, 5)]
    assert torch.equal(layout.join(parts), x)
    masks = layout.masks(torch.tensor([[True, True, True, False], [True, False, False, False]]))
    assert masks[3].tolist() == [[True, True, False, True, False, False], [False] * 6]


def test_each_feature_has_its_schedule(loaded):
    flow, *_ = loaded
    alpha = flow.layout.split(flow.path.alpha(torch.tensor([[0.3]])))
    own = flow.own_time(torch.tensor(0.3))
    assert float(own) == pytest.approx(2 / math.pi * math.asin(math.sqrt(0.3)))
    for part, nu in zip(alpha, (1, 2, 2, 1.5), strict=True):
        expected = 1 - torch.cos(torch.pi / 2 * own**nu) ** 2
        torch.testing.assert_close(part, expected.expand_as(part))


def test_sizes_are_drawn_as_they_occur(loaded):
    flow, *_ = loaded
    mask = flow.draw_context(4000, generator(0))
    shares = torch.bincount(mask.sum(1), minlength=6) / 4000
    torch.testing.assert_close(shares, flow.size_weights.float(), rtol=0, atol=0.04)  # five standard errors
    assert torch.equal(flow.select_context(mask, torch.tensor([5, 2])), mask[[5, 2]])


def test_noise_is_standard_normal_about_its_centre_of_mass_and_zero_where_nothing_is(loaded):
    flow, *_ = loaded
    x, mask = states(flow, [5] * 4000)
    more = flow.noise_like(x, generator(1), mask)
    for sample in (x, more):
        coordinates, *others = flow.layout.split(sample)
        torch.testing.assert_close(coordinates.mean(1), torch.zeros(4000, 3), rtol=0, atol=1e-6)
        # Five standard errors of the variance; one of five atoms is bound by the others.
        assert float(coordinates.square().mean()) == pytest.approx(0.8, abs=0.02)
        for part in others:
            assert float(part.square().mean()) == pytest.approx(1, abs=0.03)
    x, mask = states(flow, [2, 3])
    for part, rows in zip(flow.layout.split(x), flow.layout.masks(mask), strict=True):
        assert not part[~rows].any()
        assert part[rows].any()


def test_the_velocity_leads_to_the_predicted_endpoint(loaded):
    flow, *_ = loaded
    x, mask = states(flow, [5, 3, 2])
    t = torch.tensor([0.2, 0.5, 0.9])
    endpoint = flow.endpoint(x, t, mask)
    alpha, beta = flow.path.alpha(t[:, None]), flow.path.beta(t[:, None])
    noise = (x - alpha * endpoint) / beta
    expected = flow.path.alpha_rate(t[:, None]) * (endpoint - noise)
    torch.testing.assert_close(flow.velocity(x, t, mask), expected, rtol=1e-4, atol=1e-5)
    parts, masks = flow.layout.split(endpoint), flow.layout.masks(mask)
    torch.testing.assert_close(parts[0].sum(1), torch.zeros(3, 3), rtol=0, atol=1e-5)
    for part, rows in zip(parts[1:], masks[1:], strict=True):
        torch.testing.assert_close(part.sum(2), rows.float())  # probabilities where there is something


def test_molecules_do_not_see_each_other_or_their_padding(loaded):
    flow, *_ = loaded
    x, mask = states(flow, [5, 3, 2])
    together = flow.velocity(x, torch.tensor(0.6), mask)
    for i in range(3):
        alone = flow.velocity(x[i : i + 1], torch.tensor([0.6]), mask[i : i + 1, : int(mask[i].sum())])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_the_velocity_turns_and_is_renumbered_with_the_molecule(loaded):
    """What a rotation and another order of the atoms do to the state, they do to the velocity."""
    flow, *_ = loaded
    x, mask = states(flow, [5])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator(1)))[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    first, second = order[flow.layout.pairs]
    low, high = torch.minimum(first, second).tolist(), torch.maximum(first, second).tolist()
    known = {pair: k for k, pair in enumerate(map(tuple, flow.layout.pairs.T.tolist()))}
    pairs = torch.tensor([known[pair] for pair in zip(low, high, strict=True)])

    def moved(state):
        coordinates, types, charges, bonds = flow.layout.split(state)
        return flow.layout.join(
            [coordinates[:, order] @ rotation, types[:, order], charges[:, order], bonds[:, pairs]]
        )

    t = torch.tensor(0.4)
    torch.testing.assert_close(
        flow.velocity(moved(x), t, mask), moved(flow.velocity(x, t, mask)), rtol=1e-4, atol=1e-5
    )


def test_the_pull_back_reaches_all_features(loaded):
    flow, *_ = loaded
    x, mask = states(flow, [5, 3])
    v, pull = flow.linearised(x[None], torch.tensor([0.5]), mask)(0)
    pushed = torch.zeros_like(v)
    flow.layout.split(pushed)[0].normal_(generator=generator(2))
    for part, rows in zip(flow.layout.split(pull(pushed)), flow.layout.masks(mask), strict=True):
        assert part[rows].any()
        assert not part[~rows].any()


def test_both_samplers_stay_in_the_subspace_and_the_types_become_probabilities(loaded):
    flow, decode, _ = loaded
    flow.time_power = 2.0
    mask = flow.draw_context(20, generator(0))
    for x in (
        sample_sde(flow, 20, 10, generator(1), mask)[-1],
        sample_ode(flow, 20, generator(1), mask, OdeSettings(steps=50)),
    ):
        coordinates, *others = flow.layout.split(x)
        torch.testing.assert_close(coordinates.sum(1), torch.zeros(20, 3), rtol=0, atol=1e-4)
        for part, rows in zip(others, flow.layout.masks(mask)[1:], strict=True):
            # The ODE stops a margin of 1e-4 before the data, where four times that is left of the noise.
            torch.testing.assert_close(part.sum(2), rows.float(), rtol=0, atol=1e-2)
        assert float(coordinates.abs().max()) < 10
        decoded, numbers = decode(x, mask)
        assert torch.equal(decoded, coordinates)
        assert torch.equal(numbers > 0, mask)
        assert set(numbers.unique().tolist()) <= {0, 1, 6, 7, 8, 9}


def test_the_decoder_follows_the_order_of_the_models_elements_and_the_width_of_the_mask(loaded):
    flow, decode, _ = loaded
    x = torch.zeros(1, sum(flow.layout.sizes))
    parts = flow.layout.split(x)
    parts[0].normal_(generator=generator(0))
    for atom, column in enumerate((0, 1, 2, 3, 4)):
        parts[1][0, atom, column] = 0.6
    coordinates, numbers = decode(x, torch.tensor([[True, True, True]]))
    assert numbers.tolist() == [[6, 1, 7]]
    assert torch.equal(coordinates, parts[0][:, :3])
    assert decode(x, torch.ones(1, 5).bool())[1].tolist() == [[6, 1, 7, 8, 9]]


def test_data_are_discrete_and_cost_what_their_likelihood_says(loaded):
    flow, *_ = loaded
    x, mask = states(flow, [5, 3, 2])
    data = flow.data_of(x, mask)
    for part, rows in zip(flow.layout.split(data)[1:], flow.layout.masks(mask)[1:], strict=True):
        assert torch.equal(part[rows].sort(1).values[:, -1], torch.ones(int(rows.sum())))
        assert torch.equal(part.sum(2), rows.float())
    torch.testing.assert_close(flow.layout.split(data)[0], flow.layout.split(x)[0])
    t = torch.tensor([0.3, 0.6, 0.9])
    losses = flow.matching_loss(data, x, t, mask)
    assert losses.shape == (3,)
    # By hand, for the last molecule: of two atoms and one bond.
    alpha, beta = flow.path.alpha(t[2:, None]), flow.path.beta(t[2:, None])
    at = flow.endpoint(alpha * data[2:] + beta * x[2:], t[2:], mask[2:])
    weights = [w[0, 0, 0] for w in flow.layout.split((alpha / beta).clamp(0.05, 1.5))]
    (x1, *sure), (y, *found) = flow.layout.split(data[2:]), flow.layout.split(at)
    uncentred = flow.predict(alpha * data[2:] + beta * x[2:], t[2:], flow.layout.masks(mask[2:]), True)[0]
    expected = weights[0] * (uncentred - x1[0, :2]).square().mean()
    for weight, one, share, rows in zip(weights[1:], sure, found, (2, 2, 1), strict=True):
        expected += weight * -(one * share.clamp(min=1e-30).log())[0, :rows].sum() / rows
    torch.testing.assert_close(losses[2], expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(y).all()


# --- Solvers ---------------------------------------------------------------------------------------


class Compactness(Reward):
    """Minus the mean square of an atom's coordinates."""

    def value(self, x, context=None):
        coordinates = x[:, : 3 * context.shape[1]].unflatten(1, (-1, 3))
        return -coordinates.square().sum((1, 2)) / context.sum(1)


@pytest.mark.slow
def test_adjoint_matching_moves_the_molecules_towards_the_reward(loaded):
    """On the same noise; how far, the network that stands in decides, which bends coordinates but little."""
    flow, *_ = loaded
    flow.time_power = 2.0
    reward, mask = Compactness(), flow.draw_context(200, generator(1))
    choice = AdjointMatchingSettings(
        updates=40, batch=16, pool=16, steps=8, learning_rate=2e-3, ramp=0.2, control_clip=4.0
    )
    solution = solve(flow, RewardVariation(reward), 1.0, choice, generator(0))
    before, after = (
        reward.value(sample_sde(model, 200, 10, generator(2), mask)[-1], mask)
        for model in (flow, solution.model)
    )
    gain = after - before
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(200)


def test_types_of_states_are_those_that_they_decode_to_where_they_are_certain(loaded):
    flow, decode, types = loaded
    x, mask = states(flow, [2, 5])
    certain = flow.data_of(x, mask)
    shares = types(certain, mask)
    numbers = torch.tensor(ATOMIC_NUMBERS)
    assert torch.equal(shares.sum(2), mask.to(x))
    assert torch.equal((shares @ numbers.to(x)).long(), decode(certain, mask)[1])
    # Linear in the states, up to what there is no atom for.
    torch.testing.assert_close(types(x + 2 * certain, mask), types(x, mask) + 2 * shares)
