import pytest
import torch

from closed_forms import generator
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.domains.molecules.sections import MoleculeNetworkConfig, UnitsConfig
from flowtilt.domains.molecules.states import WIDTH, centred
from flowtilt.interpolants import convert
from flowtilt.sampling import OdeSettings, sample_ode, sample_sde

SIZES = torch.tensor([0, 0, 0, 1.0, 0, 2.0, 3.0])
SMALL = MoleculeNetworkConfig(layers=2, width=16, vectors=8, pair_width=12, heads=4, radial=8)
TIMES = [0.0, 0.02, 0.5, 0.97]


@pytest.fixture(scope="module")
def flow():
    """A network with random weights in every layer: as built, the last ones are zero."""
    rng = generator(3)
    model = MoleculeFlow(SMALL, UnitsConfig(), SIZES).double().requires_grad_(False)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return model


def states(flow, count=6, seed=0):
    rng = generator(seed)
    mask = flow.draw_context(count, rng)
    return flow.noise_like(torch.zeros(count, flow.atoms, WIDTH, dtype=torch.float64), rng, mask), mask


def orthogonal(seed, determinant):
    q = torch.linalg.qr(torch.randn(3, 3, generator=generator(seed), dtype=torch.float64)).Q
    return q * (torch.sign(torch.linalg.det(q)) * determinant)


def close(found, expected):
    """Of a network in double precision, whose values are of order one."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
@pytest.mark.parametrize("t", TIMES)
def test_turned_and_mirrored_molecules_have_turned_and_mirrored_velocities(flow, t, determinant):
    x, mask = states(flow)
    turn, at = orthogonal(1, determinant), torch.tensor(t)

    def turned(y):
        return torch.cat([y[..., :3] @ turn.T, y[..., 3:]], dim=2)

    velocity = flow.velocity(x, at, mask)
    assert float((velocity[..., :3] - turned(velocity)[..., :3]).abs().max()) > 0.1
    close(flow.velocity(turned(x), at, mask), turned(velocity))


@pytest.mark.parametrize("t", TIMES)
def test_where_the_centre_of_mass_lies_makes_no_difference(flow, t):
    x, mask = states(flow)
    shift = torch.cat([torch.tensor([3.0, -2.0, 1.0]), torch.zeros(WIDTH - 3)]).double()
    moved = x + shift * mask.unsqueeze(2)
    close(flow.velocity(moved, torch.tensor(t), mask), flow.velocity(x, torch.tensor(t), mask))


@pytest.mark.parametrize("t", TIMES)
def test_the_order_of_atoms_makes_no_difference(flow, t):
    x, mask = states(flow)
    order = torch.randperm(flow.atoms, generator=generator(5))
    found = flow.velocity(x[:, order], torch.tensor(t), mask[:, order])
    close(found, flow.velocity(x, torch.tensor(t), mask)[:, order])


@pytest.mark.parametrize("t", TIMES)
def test_padding_changes_nothing_and_does_not_move(flow, t):
    x, mask = states(flow)
    at = torch.tensor(t)
    velocity = flow.velocity(x, at, mask)
    assert bool((velocity[~mask] == 0).all())
    wider = torch.cat([x, torch.zeros(len(x), 3, WIDTH)], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(len(x), 3, dtype=torch.bool)], dim=1)
    close(flow.velocity(wider, at, wider_mask)[:, : flow.atoms], velocity)
    for i in range(len(x)):
        atoms = int(mask[i].sum())
        close(flow.velocity(x[i : i + 1, :atoms], at, mask[i : i + 1, :atoms])[0], velocity[i, :atoms])


def test_each_molecule_has_its_own_time(flow):
    x, mask = states(flow)
    t = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    together = flow.velocity(x, t, mask)
    for i in range(len(x)):
        close(flow.velocity(x[i : i + 1], t[i], mask[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("t", TIMES)
def test_the_velocity_stays_in_the_subspace_and_is_that_of_the_endpoint(flow, t):
    x, mask = states(flow)
    at = torch.tensor(t, dtype=torch.float64)
    velocity = flow.velocity(x, at, mask)
    close(velocity[..., :3].sum(1), torch.zeros(len(x), 3).double())
    endpoint = convert(velocity, x, at, flow.path, "velocity", "endpoint")
    close(endpoint, flow.endpoint(x, at, mask))
    close(endpoint[..., 3:].sum(2), flow.units.type_scale * mask.double())
    close(endpoint, x + (1 - at) * velocity)


def test_noise_is_standard_normal_in_the_subspace_without_centre_of_mass(flow):
    count, atoms = 40_000, 5
    mask = flow.context_of(torch.full((count,), atoms))
    for noise in (
        flow.prior(count, generator(0), mask),
        flow.noise_like(torch.zeros(count, flow.atoms, WIDTH), generator(1), mask),
    ):
        assert bool((noise[:, atoms:] == 0).all())
        assert float(noise[..., :3].sum(1).abs().max()) < 1e-5
        flat = noise[:, :atoms].flatten(1).double()
        projection = torch.eye(atoms).double() - 1 / atoms
        one = torch.ones(WIDTH).double()
        blocks = torch.einsum("ij,c,cd->icjd", projection, (one[:3]), torch.eye(3).double())
        expected = torch.eye(atoms * WIDTH).double().view(atoms, WIDTH, atoms, WIDTH)
        expected[:, :3, :, :3] = blocks
        # Five standard errors of a covariance of unit normals, whose variance is at most 2 / count.
        deviation = (flat.T.cov() - expected.reshape(atoms * WIDTH, -1)).abs().max()
        assert float(deviation) < 5 * (2 / count) ** 0.5
        assert float(flat.mean(0).abs().max()) < 5 / count**0.5


def test_sizes_are_drawn_as_they_occur_and_others_are_refused(flow):
    count = 30_000
    mask = flow.draw_context(count, generator(0))
    assert mask.shape == (count, 6)
    assert mask.dtype == torch.bool
    shares = torch.bincount(mask.sum(1), minlength=7) / count
    expected = SIZES / SIZES.sum()
    assert float((shares - expected).abs().max()) < 5 * (0.25 / count) ** 0.5
    assert bool((shares[expected == 0] == 0).all())
    with pytest.raises(ValueError, match="no training example has 4, 9 atoms; ask for sizes among 3, 5, 6"):
        flow.context_of(torch.tensor([3, 4, 9]))


def test_the_context_of_some_samples_is_theirs(flow):
    x, mask = states(flow)
    index = torch.tensor([4, 1])
    close(
        flow.velocity(x[index], torch.tensor(0.3), flow.select_context(mask, index)),
        flow.velocity(x, torch.tensor(0.3), mask)[index],
    )


def test_the_velocity_can_be_differentiated(flow):
    x, mask = states(flow, count=2)
    w = torch.randn(x.shape, generator=generator(9), dtype=torch.float64)
    direction = flow.noise_like(x, generator(10), mask)

    def value(y):
        return (w * flow.velocity(y, torch.tensor(0.4), mask)).sum()

    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-5
    difference = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    # Central differences are wrong by the step squared times a third derivative.
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-6)


def test_gradients_are_finite_where_atoms_coincide(flow):
    x, mask = states(flow, count=2)
    x = torch.zeros_like(x).requires_grad_(True)
    (gradient,) = torch.autograd.grad(flow.velocity(x, torch.tensor(0.4), mask).square().sum(), x)
    assert bool(torch.isfinite(gradient).all())


def test_samplers_stay_in_the_subspace(flow):
    mask = flow.draw_context(7, generator(0))
    single = MoleculeFlow(SMALL, UnitsConfig(), SIZES)
    for x in (
        sample_ode(single, 7, generator(1), mask, OdeSettings(steps=4)),
        sample_sde(single, 7, 6, generator(1), mask)[-1],
    ):
        assert bool(torch.isfinite(x).all())
        assert bool((x[~mask] == 0).all())
        assert float(centred(x[..., :3], mask).sub(x[..., :3]).abs().max()) < 1e-5


def test_the_loss_is_least_at_the_mean_of_the_endpoint():
    """Two molecules only, so that the posterior mean is known: the loss's gradient there must vanish."""
    flow = MoleculeFlow(SMALL, UnitsConfig(type_scale=0.7), SIZES).double()
    rng, t, count = generator(0), 0.6, 200_000
    mask = torch.ones(2, 3, dtype=torch.bool)
    x1 = flow.noise_like(torch.zeros(2, 3, WIDTH).double(), rng, mask)
    x1[..., 3:] = 0.7 * torch.eye(5).double()[torch.tensor([[0, 1, 2], [3, 3, 0]])]
    index = torch.randint(2, (count,), generator=rng)
    x0 = flow.noise_like(x1[index], rng, mask[index])
    x = t * x1[index] + (1 - t) * x0
    distances = (x.unsqueeze(1) - t * x1).flatten(2).square().sum(2)
    posterior = torch.softmax(-distances / (2 * (1 - t) ** 2), dim=1)
    mean = torch.einsum("nk,kac->nac", posterior, x1)
    shift = torch.zeros(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def predict(state, time, context):
        coordinates = mean[..., :3] + shift[:, :3]
        probabilities = (mean[..., 3:] / 0.7).clamp_min(1e-300)
        scale = (time[0] ** 2 + (1 - time[0]) ** 2).sqrt()
        return coordinates, probabilities.log() + shift[:, 3:], (1 - time[0]) / scale

    flow.predict = predict
    losses = flow.matching_loss(x1[index], x0, torch.full((count,), t).double(), mask[index])
    (gradient,) = torch.autograd.grad(losses.mean(), shift)
    # A gradient's terms are at most 2 (x1 - mean) / error^2 / 9 < 2 in size, and of mean zero.
    assert float(gradient.abs().max()) < 5 * 2 / count**0.5
    off = flow.matching_loss(x1[index], x0, torch.full((count,), 0.6).double(), mask[index])
    assert off.shape == (count,)


def test_sizes_of_layers_must_divide_by_heads():
    with pytest.raises(ValueError, match=r"vectors \(10\) must be a multiple of heads \(4\)"):
        MoleculeNetworkConfig(vectors=10, heads=4)


def test_a_missing_mask_is_named():
    model = MoleculeFlow(SMALL, UnitsConfig(), SIZES)
    with pytest.raises(TypeError, match="needs the mask of atoms as its context, not NoneType"):
        sample_ode(model, 3, generator(0))
    with pytest.raises(TypeError, match="draw one with draw_context"):
        model.noise_like(torch.zeros(2, 6, WIDTH), generator(0))


def test_endpoints_stand_for_molecules_with_one_type_an_atom(flow):
    x, mask = states(flow)
    data = flow.data_of(x, mask)
    close(data[..., :3], x[..., :3])
    types = data[..., 3:] / flow.units.type_scale
    assert torch.equal(types.sum(2), mask.double())
    assert torch.equal(types.argmax(2)[mask], x[..., 3:].argmax(2)[mask])
    close(flow.data_of(data, mask), data)
    # Of data the types' loss is a cross entropy: it is not negative.
    assert bool((flow.matching_loss(data, x, torch.full((len(x),), 0.5).double(), mask) > 0).all())


def test_the_time_grid_is_the_model_s():
    model = MoleculeFlow(SMALL, UnitsConfig(), SIZES, time_power=2.0)
    assert model.time_grid(2) == [0.0, 0.75, 1.0]
    assert sample_sde(model, 3, 2, generator(0), model.draw_context(3, generator(0))).shape[0] == 3
