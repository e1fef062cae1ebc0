"""Where tensors live. There is no GPU here: torch's fake tensors have a device, shapes, and no values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flowtilt.control.adjoint_matching import LossScale, _residuals, lean_adjoint
from flowtilt.control.endpoints import Terminal
from flowtilt.devices import generator_of, take_device
from flowtilt.domains.molecules.model import MoleculeFlow
from flowtilt.domains.molecules.sections import MoleculeNetworkConfig, UnitsConfig
from flowtilt.domains.planar.model import PlanarFlow
from flowtilt.interpolants import VariancePreserving
from flowtilt.model import Context, FlowModel
from flowtilt.sampling import OdeSettings, memoryless_steps, sample_ode, sample_sde

STEPS, BATCH = 4, 3


@pytest.fixture
def gpu() -> Iterator[torch.Generator]:
    """A GPU as torch's default device, as a stage has it; a generator of it, which only real ones have.

    Coefficients of the steps are numbers, which fake tensors have none of: they are computed before.
    """
    generator = torch.Generator()
    for flow, _ in flows().values():
        memoryless_steps(flow, STEPS)
    with FakeTensorMode():
        torch.set_default_device("cuda")
        try:
            yield generator
        finally:
            torch.set_default_device(None)


def flows() -> dict[str, tuple[FlowModel, Context]]:
    sizes = torch.tensor([0.0, 0.0, 1.0, 1.0])
    small = MoleculeNetworkConfig(layers=2, width=8, vectors=4, pair_width=4, heads=2, radial=4)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    return {
        "planar": (PlanarFlow(VariancePreserving(), (8, 8), "silu"), None),
        "molecules": (MoleculeFlow(small, UnitsConfig(), sizes, time_power=2.0), mask),
    }


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def test_fake_devices_do_not_mix(gpu: torch.Generator) -> None:
    """Without this the tests below would say nothing."""
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(3) + torch.zeros(3, device="cpu")


@pytest.mark.parametrize("name", ["planar", "molecules"])
@pytest.mark.slow_after(1)
def test_a_flow_lives_and_is_sampled_on_the_default_device(gpu: torch.Generator, name: str) -> None:
    flow, context = flows()[name]
    assert all(on_gpu(parameter) for parameter in flow.parameters())
    trajectories = sample_sde(flow, BATCH, STEPS, gpu, context)
    assert on_gpu(trajectories)
    assert on_gpu(sample_ode(flow, BATCH, gpu, context, OdeSettings(steps=2)))
    end = trajectories[-1]
    # Autograd asks a real GPU for its streams; where it takes tensors is its own affair.
    with torch.no_grad():
        assert on_gpu(flow.matching_loss(end, trajectories[0], torch.full((BATCH,), 0.5), context))


@pytest.mark.parametrize("name", ["planar", "molecules"])
@pytest.mark.slow_after(1)
def test_adjoints_and_their_loss_live_there_too(gpu: torch.Generator, name: str) -> None:
    flow, context = flows()[name]
    steps = memoryless_steps(flow, STEPS)
    trajectories = sample_sde(flow, BATCH, STEPS, gpu, context)
    adjoints = velocities = trajectories[1:]
    if isinstance(flow, PlanarFlow):  # by hand, without autograd
        adjoints, velocities = lean_adjoint(flow, trajectories, Terminal(trajectories[-1]), steps, context)
        assert on_gpu(adjoints)
    chosen = torch.randperm(STEPS, generator=gpu)
    scale = LossScale(torch.ones(STEPS), torch.ones(STEPS))
    times = torch.tensor(flow.time_grid(STEPS), dtype=torch.float64)[:-1]
    with torch.no_grad():
        squares, energies = _residuals(
            flow,
            trajectories[chosen],
            times[chosen].to(trajectories),
            velocities[chosen],
            adjoints[chosen],
            LossScale(scale.mean[chosen].to(trajectories), scale.noise[chosen].to(trajectories)),
            context,
        )
    assert on_gpu(squares)
    assert on_gpu(energies)


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_taken_where_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "set_default_device", taken.append)
    take_device()
    assert taken == (["cuda"] if there else [])


def test_without_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert take_device() == torch.get_default_device() == torch.device("cpu")
    assert generator_of("a", 1).device.type == "cpu"
    assert generator_of("a", 1).initial_seed() == generator_of("a", 1).initial_seed()
    assert generator_of("a", 1).initial_seed() != generator_of("a", 2).initial_seed()
