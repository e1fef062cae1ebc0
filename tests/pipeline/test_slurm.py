"""What is asked of a cluster before anything is submitted, on answers of clusters of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowtilt.pipeline.doctor import examine
from flowtilt.pipeline.slurm import (
    Cluster,
    ClusterError,
    Partition,
    Submission,
    ask_cluster,
    check_submissions,
    read_minutes,
    read_partitions,
    state_command,
    status_command,
)
from slurm_commands import write_cluster, write_commands
from small import CONFIG

SMOKE = CONFIG / "smoke.yaml"
CPU = Partition("cpu", default=True, minutes=1440, gpus=False)
LONG = Partition("long", default=False, minutes=None, gpus=False)
GPU = Partition("gpu", default=False, minutes=2880, gpus=True)


def cluster(*partitions: Partition, accounts: bool = True, remembered: int = 300) -> Cluster:
    return Cluster({partition.name: partition for partition in partitions}, accounts, remembered)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("infinite", None), ("30:00", 30), ("4:00:00", 240), ("1-00:00:00", 1440), ("7-12:30:00", 10830)],
)
def test_time_limits_are_read(limit: str, minutes: int | None) -> None:
    assert read_minutes(limit) == minutes


def test_partitions_are_read() -> None:
    listed = [
        "cpu*|1-00:00:00|(null)",
        "gpu|2-00:00:00|gpu:a100:4(S:0-1)",
        "gpu|2-00:00:00|(null)",
        "long|infinite|bandwidth:10G",
    ]
    assert list(read_partitions("\n".join(listed)).values()) == [CPU, GPU, LONG]


@pytest.mark.parametrize(
    ("partition", "asked"),
    [
        ("", Submission("a", 1440)),
        ("long", Submission("b", 100000)),
        ("cpu,gpu", Submission("c", 2000, gpus=1)),
    ],
)
def test_submissions_that_fit_are_let_through(partition: str, asked: Submission) -> None:
    check_submissions(cluster(CPU, LONG, GPU), partition, [asked])


@pytest.mark.parametrize(
    ("partitions", "named", "asked", "words"),
    [
        ((LONG, GPU), "", {}, ("no default", "long, gpu", "SBATCH_PARTITION", "--default-resources")),
        ((CPU, LONG), "cpus", {}, ("no partition cpus", "cpu, long")),
        ((CPU, GPU), "", {"gpus": 1}, ("finetune asks for a GPU", "partition cpu", "--config gpu=0")),
        ((CPU, LONG), "", {"minutes": 1441}, ("asks for 1441 min", "cpu (1440 min)", "runtime=MINUTES")),
    ],
)
def test_a_submission_that_cannot_run_is_refused(
    partitions: tuple[Partition, ...], named: str, asked: dict[str, int], words: tuple[str, ...]
) -> None:
    with pytest.raises(ClusterError) as error:
        check_submissions(cluster(*partitions), named, [Submission("finetune", **{"minutes": 10, **asked})])
    for word in words:
        assert word in str(error.value)


def test_the_state_of_jobs_is_asked_of_what_remembers_them() -> None:
    assert status_command(cluster(CPU), 20) == "sacct"
    assert status_command(cluster(CPU, accounts=False), 20) == "squeue"
    with pytest.raises(ClusterError, match=r"after 200 s \(MinJobAge\).* 240 s"):
        status_command(cluster(CPU, accounts=False, remembered=200), 20)
    with pytest.raises(ClusterError, match="600 s"):
        status_command(cluster(CPU, accounts=False), 200)


def test_a_cluster_is_asked_for_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "Configuration data\nAccountingStorageType   = accounting_storage/slurmdbd\nMinJobAge = 300 sec"
    monkeypatch.setenv("PATH", write_cluster(tmp_path, "cpu*|1-00:00:00|(null)", config))
    assert ask_cluster() == cluster(CPU)


def test_a_machine_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", write_commands(tmp_path))
    with pytest.raises(ClusterError, match=r"sbatch was not found.*login node"):
        ask_cluster()


def test_a_controller_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = "echo 'Unable to contact slurm controller' >&2; exit 1"
    monkeypatch.setenv("PATH", write_commands(tmp_path, sbatch="exit 1", sinfo=silent))
    with pytest.raises(ClusterError, match=r"does not answer: sinfo .*Unable to contact"):
        ask_cluster()


# --------------------------------------------------------------------------------- the doctor


def set_up_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, partitions: str) -> None:
    monkeypatch.chdir(CONFIG.parent)
    monkeypatch.setenv("PATH", write_cluster(folder, partitions))


def test_the_doctor_says_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_cluster(tmp_path, monkeypatch, "cpu*|1-00:00:00|(null)")
    said = "\n".join(examine([SMOKE], ""))
    assert "SLURM: partitions cpu (1440 min); the state of jobs is asked of squeue" in said
    assert "what is planned fits; the longest submission asks for at least 300 min" in said
    assert state_command(20) == "squeue"


@pytest.mark.parametrize(
    ("partitions", "partition", "gpu", "words"),
    [
        ("cpu*|0:29:00|(null)", "", None, ("the group pretrain asks for 40 min", "cpu (29 min)")),
        ("cpu*|4:00:00|(null)", "", None, ("molecules_pretrain asks for 300 min", "cpu (240 min)")),
        ("cpu*|1-00:00:00|(null)", "", 1, ("pretrain asks for a GPU", "partition cpu")),
        ("cpu*|1-00:00:00|(null)", "night", None, ("no partition night", "name one of cpu")),
        ("cpu|1-00:00:00|(null)", "", None, ("no default one", "name one of cpu")),
    ],
)
def test_the_doctor_refuses_what_the_cluster_cannot_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    partitions: str,
    partition: str,
    gpu: int | None,
    words: tuple[str, ...],
) -> None:
    set_up_cluster(tmp_path, monkeypatch, partitions)
    with pytest.raises(ClusterError) as error:
        examine([SMOKE], partition, gpu)
    for word in words:
        assert word in str(error.value)


def test_the_doctor_of_a_machine_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG.parent)
    monkeypatch.setenv("PATH", write_commands(tmp_path))
    said = "\n".join(examine([], ""))
    assert "conda: not found; run without --use-conda" in said
    assert "SLURM: not found" in said
    assert state_command(20) is None
