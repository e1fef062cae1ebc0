"""The sentence under a table on what the time steps of its experiments leave of a tilt."""

from typing import Any

import pytest

from flowtilt.control.adjoint_matching import AdjointMatchingSettings
from flowtilt.control.discretisation import discretisation_bias
from flowtilt.interpolants import Linear, VariancePreserving, time_grid
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.discretisation import discretisation_note
from small import CONFIG, in_plane


def note_of(name: str, **changes: Any) -> str:
    return discretisation_note(list(load_file(CONFIG / "experiments" / f"{name}.yaml", changes).values()))


def test_a_planar_experiment_has_its_own_path_steps_and_target() -> None:
    times = tuple(time_grid(20))
    weight = discretisation_bias(VariancePreserving(0.1, 12.0), times, 1.0, AdjointMatchingSettings(steps=20))
    note = note_of("risk_averse_2d")
    assert f"to {weight.exact:.3f} is solved by Adjoint Matching to {weight.reached:.3f}, at the path" in note
    assert "the 20 time steps" in note
    assert f"to {weight.reached:.3f}," not in note_of("risk_averse_2d", **in_plane(solver={"target": "step"}))


def test_molecules_have_their_time_grid_and_name_methods_that_differ() -> None:
    former = AdjointMatchingSettings(steps=20, adjoint="posterior_mean", target="step")
    weight = discretisation_bias(Linear(), tuple(time_grid(20, 2.0)), 0.0, former)
    note = note_of("molecules_qm9")
    assert f"{weight.reached:.3f} (am, fdc, tfft" in note
    assert "(am_lean)" in note


@pytest.mark.parametrize("name", ["text_to_image_left_tail", "text_to_image_entropy"])
def test_images_have_the_noise_schedule(name: str) -> None:
    assert note_of(name).startswith("Discretisation: ")
