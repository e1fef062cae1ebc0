"""Processes that share a fine-tuning, against one that does it alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shared_work
from flowtilt.parallel import ALONE, Processes
from flowtilt.sampling import CHUNK, positions_of

pytest.importorskip("accelerate", reason="the extra 'parallel' is not installed")

WORK = Path(shared_work.__file__)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What all solves have left, by the number of processes, which take seconds to begin."""
    made = {}
    for count in (1, 2):
        made[count] = tmp_path_factory.mktemp("processes")
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        done = subprocess.run(
            [sys.executable, *(many if count > 1 else []), str(WORK), str(made[count])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    return made


def left(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and history of a solve."""
    return load_file(folder / "weights.safetensors"), json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize("name", shared_work.SOLVES)
@pytest.mark.slow
def test_two_processes_give_the_result_of_one(name: str, folders: dict[int, Path]) -> None:
    """Up to the order of sums, in float64."""
    alone, history = left(folders[1] / name)
    shared, together = left(folders[2] / name)
    assert (history["processes"], together["processes"]) == (1, 2)
    for key, tensor in alone.items():
        torch.testing.assert_close(shared[key], tensor, rtol=1e-9, atol=1e-9)
    assert len(history["history"]) == len(together["history"]) > 0
    for row, other in zip(history["history"], together["history"], strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"seconds"}:
            assert other[key] == pytest.approx(row[key], rel=1e-7, abs=1e-9), key


def test_the_hinge_leaves_a_process_without_trajectories() -> None:
    """What the case ``scarce`` is for: of a pool of three a batch of two may lie on one side."""
    halves = [Share(index, 2) for index in range(2)]
    assert [len(positions_of(3, half)) for half in halves] == [1, 2]


class Share(Processes):
    """One of several processes, to ask for its share only."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


@pytest.mark.parametrize("count", [1, 2, 7, CHUNK + 5, 3 * CHUNK])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_trajectory_is_simulated_by_one_process(count: int, processes: int) -> None:
    shares = [positions_of(count, Share(index, processes)) for index in range(processes)]
    assert sorted(torch.cat(shares).tolist()) == list(range(count))
    sizes = [len(share) for share in shares]
    chunks = -(-count // CHUNK)
    assert max(sizes) - min(sizes) <= chunks


def test_a_process_that_is_alone_does_everything() -> None:
    assert ALONE.leads
    own = torch.tensor([True, False])
    assert torch.equal(ALONE.gather(own, torch.arange(2), 2), own)
    assert torch.equal(ALONE.total(own), own)
    assert positions_of(4).tolist() == [0, 1, 2, 3]
