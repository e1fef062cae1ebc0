"""The pipeline through the profile `slurm`, on a real cluster of this one machine; and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from environments import StandInConda
from slurm_commands import write_cluster
from starting import HERE, MODEL, THEORY, assert_same, module, start
from workflow_copy import ROOT, SHORT, SMOKE, Project, jobs_planned

SCRIPT = ROOT / "workflow" / "scripts" / "local-slurm.sh"
# Two cores are what the smallest machine has; looks at the queue that suit jobs of seconds.
PROFILE = ("--workflow-profile", "workflow/profiles/slurm", "--cores", "2")
QUICK = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10")
HANGS = 1200.0
"""Seconds after which a run is taken to hang: many times what a busy machine needs."""


def local_slurm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[bool]:
    """A cluster of this machine alone: the one that runs already, or one that is started for these tests.

    Gives whether it was started for them.
    """
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the extra 'workflow' is not installed")
    if missing := [name for name in ("sbatch", "slurmctld", "munged") if not found(name)]:
        pytest.skip(f"SLURM is not installed, {missing[0]} is missing: apt-get install slurm-wlm munge")
    if local_slurm("status").returncode == 0:
        yield False
        return
    if os.geteuid() != 0:
        pytest.skip(
            "only root can start a cluster of this machine: sudo workflow/scripts/local-slurm.sh start"
        )
    if Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("this machine belongs to another cluster, whose nodes may not see the tests' folders")
    said = switch("start")
    assert re.search(r"^partition local\*, node \S+, \d+ cores, ", said, re.MULTILINE), said
    assert "PARTITION" not in said
    yield True
    switch("stop")
    assert not Path("/etc/slurm/slurm.conf").exists()


def switch(*arguments: str) -> str:
    """Start or stop the cluster; the script waits until it answers, or is gone. Gives what it says."""
    run = local_slurm(*arguments)
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.fixture
def cluster_with_gpu(cluster: bool) -> Iterator[None]:
    """The cluster, started again with a GPU to ask for."""
    if not cluster:
        pytest.skip("the cluster that runs is not ours to start again with a GPU")
    switch("stop")
    switch("start", "--gpus", "1")
    yield
    switch("stop")
    switch("start")


def found(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


def submitted(project: Project, *arguments: str, **environment: str) -> tuple[int, str, dict[str, list[str]]]:
    """Run Snakemake with the profile, and watch the queue meanwhile.

    Returns:
        Snakemake's exit status and both its streams; and by the comment of each job that was in the queue,
        lines ``state|minimal memory|cores|time limit|generic resources`` in which it was seen.
    """
    log = project.folder / "snakemake.log"
    seen: dict[str, list[str]] = {}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *PROFILE, *QUICK, *arguments],
            cwd=project.folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        until = time.monotonic() + HANGS
        while process.poll() is None:
            if time.monotonic() > until:
                process.kill()
                pytest.fail(
                    f"Snakemake still waits after {HANGS:g} s:\n{log.read_text()[-4000:]}", pytrace=False
                )
            time.sleep(0.5)
            watch(log, seen)
    return process.returncode, log.read_text(), seen


def watch(log: Path, seen: dict[str, list[str]]) -> None:
    """Add what the queue now says about the jobs of a run."""
    run = re.search(r"SLURM run ID: (\S+)", log.read_text(encoding="utf-8"))
    if run is None:
        return
    columns = ",".join(
        f"{name}:|" for name in ("Comment", "State", "MinMemory", "NumCPUs", "TimeLimit", "tres-per-job")
    )
    command = ["squeue", "--noheader", "--name", run[1], f"--Format={columns}"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    for line in listed.splitlines():
        comment, rest = line.rstrip("|").split("|", 1)
        if rest not in seen.setdefault(comment, []):
            seen[comment].append(rest)


def edit(path: Path, **overrides: object) -> None:
    """Add overrides of experiments to a configuration file."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["overrides"]["planar"].update(overrides)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


# ------------------------------------------------------------------------------- the script


def test_the_script_needs_root_and_says_so() -> None:
    run = subprocess.run(
        ["bash", "-s", "start"],
        input=SCRIPT.read_text(),
        user="nobody" if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 1
    assert "run it as root" in run.stderr


def test_the_script_says_what_it_changes() -> None:
    said = local_slurm("--help").stdout
    for word in ("/etc/slurm/slurm.conf", "/var/lib/flowtilt-slurm", "slurmctld", "munged", "root"):
        assert word in said
    assert local_slurm("begin").returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write to /etc/slurm")
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="SLURM is not installed")
@pytest.mark.skipif(Path("/etc/slurm/slurm.conf").exists(), reason="this machine has a cluster")
def test_the_script_leaves_another_clusters_configuration_alone() -> None:
    conf = Path("/etc/slurm/slurm.conf")
    conf.write_text("ClusterName=another\n", encoding="utf-8")
    try:
        for command, status in (("start", 1), ("stop", 0), ("status", 3)):
            run = local_slurm(command)
            assert run.returncode == status, run.stdout
            assert conf.read_text(encoding="utf-8") == "ClusterName=another\n"
        assert "was not written by this script" in local_slurm("start").stdout
        assert not Path("/var/lib/flowtilt-slurm").exists()
    finally:
        conf.unlink()


# ------------------------------------------------------------------------------- on the cluster


def test_values_are_those_of_a_local_run(cluster: bool, project: Project, finished: Project) -> None:
    # The table of one experiment, and everything that stands before its rows in the comparison.
    one = ("--config", "experiments=[risk_averse_2d]")
    tables = [f"results/smoke/tables/{name}.csv" for name in ("risk_averse_2d", "comparison")]
    target = (*SHORT, *one, "--", *tables)
    status, output, seen = submitted(project, *target)
    assert status == 0, output
    for rules in ("planar_pretrain", "planar_finetune", "planar_measure_risk_averse_2d", "planar_exact"):
        states = [line for comment, lines in seen.items() if rules in comment for line in lines]
        assert any(line.startswith("RUNNING") for line in states), (rules, seen)
    shared = output.count("has been submitted")
    assert 0 < shared < output.count("Finished jobid") / 2  # so that submissions hold several jobs each

    made = [*project.smoke.glob("tables/risk_averse_2d.*"), *project.smoke.glob("runs/*/*/*/metrics.json")]
    made += project.smoke.glob("runs/resolution_2d/**/metrics.json")
    assert len(made) > 8
    for file in made:
        assert file.read_bytes() == (finished.smoke / file.relative_to(project.smoke)).read_bytes(), file
    local = (finished.smoke / "tables" / "comparison.csv").read_text().splitlines()
    rows = (project.smoke / "tables" / "comparison.csv").read_text().splitlines()
    assert len(rows) > 8
    assert set(rows) <= set(local)


def test_snakemake_alone_submits_jobs_in_environments_of_conda(
    cluster: bool, plain: Path, project: Project, finished: Project, conda: StandInConda
) -> None:
    """Made where Snakemake runs, once, on storage that nodes see."""
    arguments = (*PROFILE, *QUICK, "--use-conda", *SHORT, "--", THEORY, MODEL)
    run = start(plain / "snakemake", project.folder, *arguments, conda=conda)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("has been submitted") == 2
    assert_same(project.folder, finished, [THEORY, MODEL])
    assert conda.record.read_text(encoding="utf-8").count('["env", "create"') == 1


def test_a_module_submits_jobs_by_the_profile_of_its_clone(
    cluster: bool, project: Project, finished: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    module(folder, project.folder / "workflow" / "Snakefile")
    profile = ("--workflow-profile", str(project.folder / PROFILE[1]))
    run = start(HERE, folder, *profile, *QUICK, "--", THEORY, MODEL)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("has been submitted") == 2
    assert_same(folder, finished, [THEORY, MODEL])
    assert not (project.folder / "results").exists()


def test_a_failing_job_ends_the_run_with_its_message(cluster: bool, project: Project) -> None:
    rate = 1e30
    edit(
        project.folder / "config" / "smoke.yaml",
        pretrain={"updates": 60, "batch": 256, "learning_rate": rate},
    )
    target = "results/smoke/runs/risk_averse_2d/pretrained/seed0/offline.npz"
    status, output, seen = submitted(project, *SHORT, "--retries", "1", "--", target)
    assert status != 0
    # Why SLURM ended a submission that jobs share, Snakemake does not print; docs/clusters.md says more.
    assert "Error in group pretrain" in output
    assert "the training loss is" in output
    assert "lower learning_rate" in output
    # What was asked for at the second attempt: twice as much.
    asked = [line.split("|")[1:4] for lines in seen.values() for line in lines]
    assert ["1500M", "1", "25:00"] in asked
    assert ["3000M", "1", "50:00"] in asked
    assert not list(project.smoke.rglob("*.npz"))


def test_slurms_own_refusal_is_shown(cluster: bool, project: Project) -> None:
    target = "results/smoke/theory/threshold.json"
    more = ("--set-resources", "theory:mem_mb=100000000", "--retries", "0")
    status, output, _ = submitted(project, *SHORT, *more, "--", target)
    assert status != 0
    assert "sbatch failed" in output
    assert "Memory specification can not be satisfied" in output or "is not available" in output


def doctor(project: Project, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the command says of the cluster and the smoke configuration."""
    command = (
        sys.executable,
        "-c",
        "from flowtilt.pipeline.cli import run; raise SystemExit(run())",
        "doctor",
    )
    return subprocess.run(
        [*command, *SMOKE, *arguments],
        cwd=project.folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--gpu", "1"), {}, ("asks for a GPU", "partition local", "--config gpu=0")),
        ((), {"SBATCH_PARTITION": "elsewhere"}, ("no partition elsewhere", "name one of local")),
        (
            ("--partition", "night"),
            {"SBATCH_PARTITION": "local"},
            ("no partition night", "name one of local"),
        ),
    ],
)
def test_what_the_cluster_cannot_run_is_said(
    cluster: bool,
    project: Project,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    words: tuple[str, ...],
) -> None:
    run = doctor(project, *arguments, **environment)
    assert run.returncode == 1
    assert "Traceback" not in run.stdout
    for word in words:
        assert word in run.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change a partition")
def test_a_cluster_without_a_default_partition_needs_a_name(cluster: bool, project: Project) -> None:
    target = "results/smoke/runs/risk_averse_2d/pretrained/seed0/model.safetensors"
    change = ["scontrol", "update", "PartitionName=local"]
    subprocess.run([*change, "Default=NO"], check=True, timeout=300)
    try:
        said = doctor(project).stdout
        for word in ("no default one", "name one of local", "SBATCH_PARTITION"):
            assert word in said
        status, output, seen = submitted(project, *SHORT, "--", target, SBATCH_PARTITION="local")
        assert status == 0, output
        assert len(seen) == 1
    finally:
        subprocess.run([*change, "Default=YES"], check=True, timeout=300)


def test_gpus_are_asked_for_where_the_configuration_has_them(
    cluster_with_gpu: None, project: Project
) -> None:
    target = "results/smoke/runs/risk_averse_2d/tfft/seed0/threshold.json"
    given = ("--config", "gpu=1", "--retries", "0")
    status, output, seen = submitted(project, *SHORT, *given, "--", target)
    # Each job of a network has a submission of its own, and a GPU; the threshold has none.
    asked = {comment: {line.split("|")[-1] for line in lines} for comment, lines in seen.items()}
    assert any("pretrain" in comment for comment in asked)
    for comment, gpus in asked.items():
        assert gpus == ({"N/A"} if "threshold" in comment else {"gres:gpu:1"}), asked
    if Path("/dev/nvidia0").exists():
        assert status == 0, output
        assert len(asked) == 3
    else:  # what SLURM gives is a file of this name: the first job says that there is no GPU behind it
        assert status != 0
        assert "key gpu: the job was to have 1, and torch sees 0" in output


# ------------------------------------------------------------------------------- without one


def test_a_missing_plugin_is_named(project: Project, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    # Debian's Python names a folder that may not be there.
    for folder in filter(Path.is_dir, map(Path, site.getsitepackages())):
        for entry in folder.iterdir():
            if "executor_plugin_slurm" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    run = subprocess.run(
        [sys.executable, "-S", "-m", "snakemake", *PROFILE, "--dry-run"],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode != 0
    assert "snakemake-executor-plugin-slurm is not installed" in run.stdout
    assert "pip install" in run.stdout


def test_a_dry_run_at_the_papers_scale_prints_what_each_job_asks_for(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The profile asks for the cluster's settings, where SLURM's commands are found.
    monkeypatch.setenv("PATH", write_cluster(tmp_path, "gpu*|infinite|gpu:8"))
    run = project.snakemake("--dry-run", *PROFILE[:2], "--configfile", "config/paper.yaml")
    assert run.returncode == 0, run.stdout
    jobs = re.findall(
        r"^ *(?:local)?rule (\w+):$.*?^ *resources: ([^\n]*)", run.stdout, re.MULTILINE | re.DOTALL
    )
    asked = {rule: dict(pair.split("=", 1) for pair in text.split(", ")) for rule, text in jobs}
    assert {*jobs_planned(run.stdout), "all"} == asked.keys()
    for rule, resources in asked.items():
        needs_gpu = rule in {
            *("planar_pretrain", "planar_offline", "planar_finetune", "planar_keep"),
            *("molecules_pretrain", "molecules_offline", "molecules_finetune", "molecules_sample"),
            *("images_pretrain_pipeline", "images_pretrain_alignment", "images_offline"),
            *("images_finetune", "images_sample", "images_evaluate", "molecules_keep", "images_keep"),
        }
        if rule != "all":
            assert resources["gpu"] == str(int(needs_gpu)), rule
            assert int(resources["mem_mb"]) >= 500
            assert int(resources["runtime"]) >= 5
    assert int(asked["planar_finetune"]["runtime"]) >= 240
