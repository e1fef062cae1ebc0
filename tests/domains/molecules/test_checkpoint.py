"""The shipped weights of the flow on molecules: what they draw, and what is said of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from flowtilt.devices import generator_of
from flowtilt.domains.molecules.assessment import Composition, total_variation
from flowtilt.domains.molecules.experiment import MoleculeExperiment
from flowtilt.pipeline.cli import prepare_torch
from flowtilt.pipeline.experiment import load_file
from flowtilt.sampling import OdeSettings
from small import CONFIG

pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

ROOT = CONFIG.parent


@pytest.fixture(scope="module")
def experiment() -> MoleculeExperiment:
    (shipped,) = load_file(CONFIG / "experiments" / "molecules_qm9.yaml").values()
    assert isinstance(shipped, MoleculeExperiment)
    return shipped


@pytest.fixture(scope="module")
def weights(experiment: MoleculeExperiment) -> Path:
    return ROOT / experiment.checkpoint.path


def test_weights_configuration_and_record_belong_together(
    experiment: MoleculeExperiment, weights: Path
) -> None:
    record = json.loads(weights.with_suffix(".json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert digest == experiment.checkpoint.sha256 == record["sha256"]
    assert weights.stat().st_size < 5e6
    assert record["configuration"] == experiment.flow.model_dump(mode="json")
    assert record["commit"]["modified"] is False
    assert record["data"] == {"package": "qm9pack", "molecules": 4005, "trained_on": 3584}
    losses = [line["mean"] for line in record["loss"]]
    assert np.mean(losses[-5:]) < np.mean(losses[5:10]) < losses[0]
    assert record["checks"]["lines"][-1]["updates"] == experiment.pretrain.updates


@pytest.fixture(scope="module")
def drawn(experiment: MoleculeExperiment, weights: Path) -> tuple[Composition, np.ndarray, list[str]]:
    """Of 400 molecules: composition, which are valid, and SMILES of the valid ones."""
    from flowtilt.domains.molecules.assessment import composition
    from flowtilt.domains.molecules.chemistry import perceive
    from flowtilt.domains.molecules.energies import molecules_of
    from flowtilt.domains.molecules.sampling import generated, load_base
    from flowtilt.domains.molecules.workers import WorkerPool

    prepare_torch()  # as every stage does: numbers below 1e-38 are slow
    base = load_base(experiment.model_copy(), weights)
    ode = OdeSettings(steps=experiment.evaluation.ode_steps)
    coordinates, numbers = generated(base, 400, ode, generator_of("checkpoint test"))
    molecules = molecules_of(coordinates.numpy(), numbers.numpy())
    with WorkerPool(1) as pool:
        structures = perceive(molecules, pool=pool)
    valid = np.array([structure.invalid is None for structure in structures])
    return composition(molecules), valid, [s.smiles for s in structures if s.smiles is not None]


@pytest.mark.slow
def test_most_of_its_molecules_are_valid_and_different(
    drawn: tuple[Composition, np.ndarray, list[str]],
) -> None:
    _, valid, smiles = drawn
    # Of 4,000 it were 64.1 %; three standard deviations of 400 draws are 7.2 %.
    assert valid.mean() > 0.569
    assert len(set(smiles)) / len(smiles) > 0.9


@pytest.mark.slow
def test_its_molecules_are_made_of_what_the_data_are(
    drawn: tuple[Composition, np.ndarray, list[str]],
) -> None:
    from flowtilt.domains.molecules import data
    from flowtilt.domains.molecules.assessment import composition

    qm9 = data.gather(
        [record for path in data.source_files()[:1] for record in data.read_records(path)]
    ).of_size(1, 12)
    reference = composition(qm9.as_molecules())
    assert total_variation(drawn[0].atoms, reference.atoms) < 0.05
    # Of 400 draws from the data's own shares it is 0.036 on average, and above 0.076 once in a hundred.
    assert total_variation(drawn[0].sizes, reference.sizes) < 0.08
