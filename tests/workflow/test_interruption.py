"""Pipelines that are killed, disturbed, or short of something: nothing half-made is taken for a result."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from flowtilt.resuming import SECONDS
from workflow_copy import PROFILE, SHORT, Project

# The table of one experiment, and everything that stands before its rows in the comparison.
TARGETS = tuple(f"results/smoke/tables/{name}.csv" for name in ("risk_averse_2d", "comparison"))
ONE = ("--config", "experiments=[risk_averse_2d]", "--", *TARGETS)
RUNS = "results/smoke/runs/risk_averse_2d"
WAIT = 1200.0

# Trainings of a second and more each, so that a busy machine still finds them at work.
LONGER = "overrides: {planar: {pretrain: {updates: 600}, solver: {updates: 80}}}\n"
LONG = (*SHORT, "config/longer.yaml")


@pytest.fixture
def longer(project: Project) -> Project:
    """A project in which nothing has been run, and whose trainings can be made longer by ``LONG``."""
    (project.folder / "config" / "longer.yaml").write_text(LONGER)
    return project


@contextmanager
def started(project: Project, *targets: str) -> Iterator[subprocess.Popen[str]]:
    """Snakemake on targets, by default all, in a process group of its own; it keeps a state each update."""
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *PROFILE, "--cores", "2", *LONG, *ONE[:3], *(targets or TARGETS)],
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, SECONDS: "0"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Snakemake and all its jobs at once, with no time to do anything about it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, f"the run ended before it could be killed:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


def states(project: Project, method: str) -> Callable[[], bool]:
    """Whether a method's training has kept a state that is newer than its outputs would be."""
    return lambda: any((project.folder / RUNS / method).glob("seed*/state/*.safetensors"))


def rows(project: Project) -> pd.DataFrame:
    """The experiment's rows of the comparison."""
    frame = pd.read_csv(project.smoke / "tables" / "comparison.csv")
    return frame[frame["experiment"] == "risk_averse_2d"].reset_index(drop=True)


def test_a_pipeline_killed_anywhere_ends_as_if_it_had_not_been(longer: Project, tmp_path: Path) -> None:
    """In pretraining, in fine-tunings of one solve and of several, and while a table is written."""
    whole = Project.copied_to(tmp_path / "whole")
    shutil.copy(longer.folder / "config" / "longer.yaml", whole.folder / "config")
    run = whole.snakemake(*LONG, *ONE)
    assert run.returncode == 0, run.stdout
    # No more is asked for than what is killed, since the scheduler may begin with any of the trainings.
    methods = ("pretrained", "am", "fdc")
    kills = [(states(longer, method), f"{RUNS}/{method}/seed0/model.safetensors") for method in methods]
    kills.append(((longer.smoke / "logs" / "table" / "risk_averse_2d.log").is_file, TARGETS[0]))
    for condition, target in kills:
        with started(longer, target) as process:
            wait_for(condition, process)
            kill(process)
        half_made = [path for path in (longer.folder / RUNS).rglob("state") if path.is_dir()]
        assert all(not (folder.parent / "model.safetensors").exists() for folder in half_made)
        if target == kills[0][1]:
            refused = longer.snakemake(*LONG, *ONE)
            assert refused.returncode != 0
            assert "--unlock" in refused.stdout  # Snakemake cannot know that nobody else is at work
        assert longer.snakemake(*LONG, "--unlock", *ONE).returncode == 0
    run = longer.snakemake(*LONG, *ONE)
    assert run.returncode == 0, run.stdout
    assert not list((longer.folder / RUNS).rglob("state"))
    pd.testing.assert_frame_equal(rows(longer), rows(whole), check_exact=True)
    for name in ("risk_averse_2d.csv", "risk_averse_2d.md"):
        table = Path("tables") / name
        assert (longer.smoke / table).read_bytes() == (whole.smoke / table).read_bytes()


def children_of(pid: int) -> list[int]:
    """All processes below one, by what Linux says of its threads."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    below = [int(child) for file in files for child in file.read_text().split()]
    return below + [grandchild for child in below for grandchild in children_of(child)]


def test_a_stage_that_the_system_kills_is_explained_and_goes_on(longer: Project) -> None:
    """As Linux does where memory runs out: the job is gone in the middle, the pipeline is there to say so."""
    target = f"{RUNS}/pretrained/seed0/model.safetensors"
    with started(longer, target) as process:
        wait_for(states(longer, "pretrained"), process)
        # The last of them is the stage, below the job's Snakemake and its shell.
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=WAIT)
    assert process.returncode != 0
    assert "Error in rule planar_pretrain" in output
    assert "killed from outside, mostly for want of memory; give it more" in output
    assert not (longer.folder / target).exists()
    kept = list((longer.folder / RUNS).rglob("state/*.safetensors"))
    assert kept
    run = longer.snakemake(*LONG, *ONE[:3], target)
    assert run.returncode == 0, run.stdout
    assert (longer.folder / target).is_file()


def test_a_second_pipeline_in_the_folder_is_refused_and_harms_nothing(longer: Project) -> None:
    with started(longer, f"{RUNS}/am/seed0/model.safetensors") as process:
        wait_for(states(longer, "pretrained"), process)
        second = longer.snakemake(*LONG, *ONE)
        assert second.returncode != 0
        assert "cannot be locked" in second.stdout
        assert "Traceback" not in second.stdout
        output, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0, output


def test_reading_the_workflow_changes_no_run_that_is_under_way(longer: Project) -> None:
    """Jobs that start after a dry run with another configuration still do what their own run planned."""
    change = ("--config", "experiments=[risk_averse_2d]", "overrides={planar: {solver: {updates: 9}}}")
    target = f"{RUNS}/am/seed0/model.safetensors"
    with started(longer, target) as process:
        wait_for(states(longer, "pretrained"), process)
        training = children_of(process.pid)[-1]
        os.kill(training, signal.SIGSTOP)  # so that nothing else starts before the dry run has ended
        jobs = longer.planned(*LONG, *change, "--nolock", "--", target)
        assert jobs == {"planar_pretrain": 1, "planar_finetune": 1}
        os.kill(training, signal.SIGCONT)
        output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output
    assert len(pd.read_csv((longer.folder / target).with_name("history.csv"))) == 80
    assert longer.planned(*LONG, *ONE[:3], target) == {}
    assert longer.planned(*LONG, *change, "--", target) == {"planar_finetune": 1}


def test_coarse_times_of_a_file_system_leave_nothing_to_do(finished: Project) -> None:
    """Times in steps of two seconds, as some file systems have them, give inputs and outputs the same one."""
    for path in [*finished.folder.rglob("*"), finished.folder]:
        if path.is_file() and ".snakemake" not in path.parts:
            coarse = path.stat().st_mtime // 2 * 2
            os.utime(path, (coarse, coarse))
    assert finished.planned(*SHORT) == {}


# ------------------------------------------------------------------------------ faults of a stage


COMMAND = (sys.executable, "-c", "from flowtilt.pipeline.cli import run; raise SystemExit(run())")


RISK = Path("runs", "risk_averse_2d", "pretrained", "seed0", "model.safetensors")
"""Where the pretrained model of the risk-averse experiment is, below the results."""


def pretrain(
    project: Project, output: Path, batch: int = 64, largest_file: int = resource.RLIM_INFINITY
) -> tuple[int, str]:
    """The stage by hand; its exit code and what it says.

    Args:
        project: whose configuration is taken.
        output: where the weights go.
        batch: of the training, of four updates.
        largest_file: in bytes; a write of the stage beyond fails half-way, as on a full disk.
    """

    def command(
        *arguments: str | Path, largest: int = resource.RLIM_INFINITY
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        )

    config, override = (
        project.folder / "risk.yaml",
        f'{{"planar": {{"pretrain": {{"updates": 4, "batch": {batch}}}}}}}',
    )
    file = "config/experiments/risk_averse_2d.yaml"
    assert command("resolve", file, "--override", override, "--output", config).returncode == 0
    stage = ("pretrain", config, "--seed", "0", "--results", project.folder / "out")
    run = command(*stage, largest=largest_file)
    assert "Traceback" not in run.stdout
    return run.returncode, run.stdout


def test_a_full_disk_is_said_and_leaves_nothing(project: Project) -> None:
    output = project.folder / "out" / RISK
    code, said = pretrain(project, output, largest_file=4096)
    assert code == 1
    assert "the disk is full; free space and run again" in said
    assert not output.exists()
    assert [path.name for path in output.parent.iterdir() if path.is_file()] == ["history.csv"]
    assert pretrain(project, output)[0] == 0
    assert output.is_file()


def test_a_folder_that_cannot_be_written_is_named(project: Project) -> None:
    """A file stands in its place, which stops the superuser as well."""
    (project.folder / "out").write_text("a file where a folder should be")
    code, said = pretrain(project, project.folder / "out" / RISK)
    assert code == 1
    assert f"{project.folder / 'out'}" in said
    assert "set the key results to a folder that you can write to" in said


def test_a_stage_without_memory_says_what_to_give_it(project: Project) -> None:
    code, said = pretrain(project, project.folder / "out" / RISK, batch=10**12)
    assert code == 1
    assert "not enough memory; lower solver.batch" in said
