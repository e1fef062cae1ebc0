"""Ways to start: Snakemake alone with conda, a module from an empty folder, a workflow that lies elsewhere.

Each runs a few jobs, and gives the bytes of the smoke run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from environments import StandInConda, make_environment
from workflow_copy import ROOT, SMOKE, Project

THEORY = "results/smoke/tables/theory_threshold.csv"
MODEL = "results/smoke/runs/risk_averse_2d/pretrained/seed0/model.safetensors"
TABLE = "results/smoke/tables/ot_2d.csv"


PLAIN = ("snakemake", "pygments", "snakemake-executor-plugin-slurm")
"""What is installed where there is nothing else; the second for reports, the third for clusters."""


@pytest.fixture(scope="session")
def plain(pytestconfig: pytest.Config) -> Path:
    """The folder of commands of an environment with Snakemake and nothing else, kept in pytest's cache."""
    cache = pytestconfig.cache.mkdir("plain-snakemake")
    pins = ROOT / "envs" / "constraints.txt"
    wanted = f"{sys.version}\n{PLAIN}\n{pins.read_text(encoding='utf-8')}"
    kept = cache / "environment"
    done = kept / "wanted.txt"
    with FileLock(cache / "lock"):
        if not (done.is_file() and done.read_text(encoding="utf-8") == wanted):
            shutil.rmtree(kept, ignore_errors=True)
            venv.create(kept, with_pip=True, symlinks=True)
            pip = [kept / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", pins, *PLAIN]
            made = subprocess.run(pip, capture_output=True, text=True, timeout=600, check=False)
            if made.returncode:
                pytest.skip(f"Snakemake cannot be fetched: {made.stderr.strip().splitlines()[-1:]}")
            done.write_text(wanted, encoding="utf-8")
    return kept / "bin"


@pytest.fixture
def conda(tmp_path: Path) -> StandInConda:
    return StandInConda.in_folder(tmp_path / "conda")


READ_ONLY = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; cd "$PWD"; exec "$@"'


def start(
    snakemake: Path,
    folder: Path,
    *arguments: str,
    conda: StandInConda | None = None,
    read_only: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake by its path in a folder, with nothing on the PATH but the system and a conda.

    A folder that shall be there for reading only needs a user who can mount; else the test is skipped.
    """
    mounted = ["unshare", "--mount", "sh", "-euc", READ_ONLY, str(read_only)] if read_only else []
    if mounted and subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a folder for reading only")
    held = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    places = [snakemake.parent, *([conda.bin] if conda else []), "/usr/local/bin", "/usr/bin", "/bin"]
    return subprocess.run(
        [*mounted, snakemake, "--cores", "2", *arguments],
        cwd=folder,
        env={**held, "PATH": os.pathsep.join(map(str, places))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


HERE = Path(sys.executable).parent / "snakemake"
"""Of an environment that holds what jobs need, which is not activated."""


def assert_same(folder: Path, finished: Project, files: Iterable[str]) -> None:
    for file in files:
        assert (folder / file).read_bytes() == (finished.folder / file).read_bytes(), file


# ----------------------------------------------------------------------------- Snakemake alone


def test_snakemake_alone_plans_and_lints(plain: Path, project: Project) -> None:
    absent = subprocess.run([plain / "python", "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode == 1
    for arguments in (("--dry-run", "--quiet", "all"), ("--lint",), ("--list-rules",), ("--summary",)):
        run = start(plain / "snakemake", project.folder, *SMOKE, *arguments)
        assert run.returncode == 0, run.stdout
        assert "Only planning works here" in run.stdout


def test_the_profile_is_found_without_an_option(plain: Path, project: Project, tmp_path: Path) -> None:
    for arguments in (
        (),
        ("-s", "workflow/Snakefile"),
        ("-s", f"{project.folder}/workflow/Snakefile"),
        ("-s", f"{project.folder}/Snakefile"),
    ):
        folder = tmp_path if project.folder.name in str(arguments) else project.folder
        run = start(plain / "snakemake", folder, *arguments, "--dry-run", "--config", "theory=[]")
        assert run.returncode == 0, run.stdout
        assert "Using workflow specific profile" in run.stdout


def test_without_packages_and_without_conda_the_cures_are_named(plain: Path, project: Project) -> None:
    run = start(plain / "snakemake", project.folder, *SMOKE, "--", THEORY)
    assert run.returncode != 0
    for word in ("lacks torch", "--use-conda", "make env", str(plain / "python")):
        assert word in run.stdout, run.stdout
    assert "Traceback" not in run.stdout
    assert not project.smoke.exists()


def test_snakemake_alone_with_conda_gives_the_same_tables(
    plain: Path, project: Project, whole: Project, conda: StandInConda
) -> None:
    run = start(plain / "snakemake", project.folder, "--use-conda", *SMOKE, "--", TABLE, THEORY, conda=conda)
    assert run.returncode == 0, run.stdout
    made = [
        str(file.relative_to(project.folder)) for file in project.smoke.glob("runs/ot_2d/*/*/metrics.json")
    ]
    assert len(made) == 3
    assert_same(project.folder, whole, [TABLE, THEORY, *made])
    again = start(plain / "snakemake", project.folder, "--sdm", "conda", *SMOKE, "--", TABLE, conda=conda)
    assert "Nothing to be done" in again.stdout
    report = ("--report", "one.html", "--", TABLE)
    run = start(plain / "snakemake", project.folder, "--use-conda", *SMOKE, *report, conda=conda)
    assert run.returncode == 0, run.stdout
    assert "Unknown target" not in run.stdout


def test_each_clone_runs_its_own_code_in_environments_that_it_shares(
    tmp_path: Path, plain: Path, finished: Project, conda: StandInConda
) -> None:
    broken, whole = (Project.copied_to(tmp_path / name) for name in ("broken", "whole"))
    stage = broken.folder / "src" / "flowtilt" / "pipeline" / "theory" / "stage.py"
    stage.write_text("raise RuntimeError('the code of the first clone')\n", encoding="utf-8")
    shared = ("--use-conda", "--conda-prefix", str(tmp_path / "shared"), *SMOKE, "--", THEORY)
    run = start(plain / "snakemake", broken.folder, *shared, conda=conda)
    assert run.returncode != 0
    assert "the code of the first clone" in run.stdout
    shutil.rmtree(broken.folder)
    run = start(plain / "snakemake", whole.folder, *shared, conda=conda)
    assert run.returncode == 0, run.stdout
    assert_same(whole.folder, finished, [THEORY])
    assert conda.record.read_text().count('["env", "create"') == 1


# ------------------------------------------------------------------------------ README's blocks


def line(containing: str) -> list[str]:
    """Words of the one line of README's shell blocks that contains some."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    found = {
        line.partition("#")[0].strip()
        for block in blocks
        for line in block.splitlines()
        if containing in line
    }
    assert len(found) == 1, found
    return shlex.split(found.pop())


def test_plain_snakemake_is_started_as_the_readme_says() -> None:
    """What the tests above run; pip's line is that of the fixture, without pins."""
    assert line("--use-conda") == ["snakemake", "--cores", "all", "--use-conda"]
    assert line("pip install snakemake") == ["pip", "install", "snakemake"]


def test_your_own_environment_is_started_as_the_readme_says(project: Project, finished: Project) -> None:
    """What pip installs takes gigabytes: here it is what runs the tests."""
    pip = line("-e '.[workflow,molecules,images]'")
    assert pip[:4] == ["pip", "install", "-c", "envs/constraints.txt"]
    assert "'.[workflow,molecules,images]'\nsnakemake --cores all\n```" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
    run = start(HERE, project.folder, *SMOKE, "--", THEORY, MODEL)
    assert run.returncode == 0, run.stdout
    assert_same(project.folder, finished, [THEORY, MODEL])


def test_make_is_started_as_the_readme_says(project: Project, finished: Project) -> None:
    words = line("make results")
    shutil.copy(ROOT / "Makefile", project.folder)
    environment = Path(sys.prefix)
    # With the environment that is there; pip's part takes gigabytes.
    given = [f"VENV={environment}", "--assume-old", f"{environment}/.complete", "CORES=2"]
    shown = subprocess.run(
        [*words, *given, "--dry-run"], cwd=project.folder, capture_output=True, text=True, check=True
    )
    command = shown.stdout.splitlines()[-1]
    assert command.startswith(
        f"{environment}/bin/snakemake --workflow-profile workflow/profiles/default --cores 2"
    )
    run = start(HERE, project.folder, *shlex.split(command)[1:], *SMOKE, "--", THEORY)
    assert run.returncode == 0, run.stdout
    assert_same(project.folder, finished, [THEORY])


APPTAINER = """\
#!/bin/sh
# Runs what Snakemake asks apptainer for, in an environment in place of the image's.
[ "$1" = --version ] && {{ echo "apptainer version 1.3.4"; exit; }}
echo "$@" >> {calls}
while [ "$1" != sh ] && [ "$1" != bash ]; do shift; done
PATH={environment}/bin:/usr/bin:/bin exec "$@"
"""


def test_a_container_is_started_as_the_readme_says(
    project: Project, finished: Project, plain: Path, tmp_path: Path
) -> None:
    """No engine is at hand to build the image: one that runs jobs with what it would hold."""
    assert line("apptainer build") == ["apptainer", "build", "envs/flowtilt.sif", "envs/flowtilt.def"]
    make_environment(ROOT / "envs" / "core.yaml", tmp_path / "image")
    engine = StandInConda(tmp_path / "engine")
    engine.bin.mkdir(parents=True)
    text = APPTAINER.format(calls=engine.record, environment=tmp_path / "image")
    (engine.bin / "apptainer").write_text(text, encoding="utf-8")
    (engine.bin / "apptainer").chmod(0o755)
    (project.folder / "envs" / "flowtilt.sif").write_bytes(b"")
    run = start(
        plain / "snakemake", project.folder, *line("--sdm apptainer")[3:], *SMOKE, "--", THEORY, conda=engine
    )
    assert run.returncode == 0, run.stdout
    assert_same(project.folder, finished, [THEORY])
    calls = engine.record.read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2
    assert all(f"{project.folder}/envs/flowtilt.sif" in call for call in calls)


def test_both_definitions_of_the_image_have_the_same_steps() -> None:
    texts = [(ROOT / "envs" / name).read_text(encoding="utf-8") for name in ("Dockerfile", "flowtilt.def")]
    for text in texts:
        assert "python:3.13-slim" in text
        assert "sh envs/install.sh" in text
        for file in ("pyproject.toml", "envs/constraints.txt", "envs/install.sh"):
            assert file in text
    subprocess.run(["sh", "-n", ROOT / "envs" / "install.sh"], check=True)


# ----------------------------------------------------------------------------------- any folder


DEPLOYED = """\
configfile: "config/config.yaml"


module flowtilt:
    snakefile:
        "{snakefile}"
    config:
        config
    {prefix}


use rule * from flowtilt{names}
"""
"""The file workflow/Snakefile as snakedeploy writes it, with the path of a clone."""


def module(folder: Path, snakefile: Path, prefix: str = "", names: str = "") -> None:
    """A folder that uses the workflow as a module, with the smoke configuration as its own."""
    text = DEPLOYED.format(snakefile=snakefile, prefix=f'prefix: "{prefix}"' if prefix else "", names=names)
    (folder / "workflow").mkdir()
    (folder / "workflow" / "Snakefile").write_text(text, encoding="utf-8")
    (folder / "config").mkdir()
    whole, smoke = (
        yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("config", "smoke")
    )
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump({**whole, **smoke}), encoding="utf-8")


ONSTART = '\n\nonstart:\n    print("the onstart of the user")\n\n\n'


@pytest.mark.parametrize(
    ("prefix", "names", "own"), [("", "", "{ONSTART}{module}"), ("below", " as tilt_*", "{module}{ONSTART}")]
)
def test_a_module_runs_from_an_empty_folder(
    prefix: str, names: str, own: str, project: Project, finished: Project, tmp_path: Path
) -> None:
    """And begins as the workflow alone does, beside what the user's own workflow does then."""
    folder = tmp_path / "mine"
    folder.mkdir()
    module(folder, project.folder / "workflow" / "Snakefile", prefix, names)
    snakefile = folder / "workflow" / "Snakefile"
    snakefile.write_text(own.format(ONSTART=ONSTART, module=snakefile.read_text()), encoding="utf-8")
    targets = [str(Path(prefix) / file) for file in (THEORY, MODEL)]
    run = start(HERE, folder, "--", *targets)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("the onstart of the user") == 1
    assert_same(folder / prefix, finished, [THEORY, MODEL])
    assert not (project.folder / "results").exists()


def test_a_module_can_have_the_workflows_own_configuration(project: Project, tmp_path: Path) -> None:
    text = f'module flowtilt:\n    snakefile: "{project.folder}/workflow/Snakefile"\n'
    text += "\n\nuse rule * from flowtilt\n"
    (tmp_path / "Snakefile").write_text(text, encoding="utf-8")
    run = start(
        HERE, tmp_path, "--dry-run", "--quiet", "rules", "--configfile", f"{project.folder}/config/smoke.yaml"
    )
    assert run.returncode == 0, run.stdout
    assert "molecules_pretrain" in run.stdout


@pytest.mark.parametrize("way", ["clone", "directory", "module"])
def test_planning_writes_nothing(way: str, project: Project, tmp_path: Path) -> None:
    """But Snakemake's own records; and where those cannot be, it says so."""
    folder = project.folder if way == "clone" else tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    given = () if way == "module" else SMOKE
    if way == "module":
        module(folder, project.folder / "workflow" / "Snakefile")
    elif way == "directory":
        snakefile, smoke = (str(project.folder / file) for file in ("workflow/Snakefile", SMOKE[1]))
        given = ("-s", snakefile, "--configfile", smoke)

    def held() -> set[Path]:
        return {file for file in folder.rglob("*") if not {".snakemake", "__pycache__"} & {*file.parts}}

    before = held()
    for asked in (("--dry-run", "--quiet", "all"), ("--summary",)):
        run = start(HERE, folder, *given, *asked)
        assert run.returncode == 0, run.stdout
        assert held() == before
    shutil.rmtree(folder / ".snakemake")
    run = start(HERE, folder, *given, "--dry-run", read_only=folder)
    assert run.returncode == 1
    assert f"{folder}/.snakemake: cannot be written" in run.stdout
    assert "Traceback" not in run.stdout


def test_a_module_without_packages_is_refused_as_its_run_begins(
    plain: Path, project: Project, tmp_path: Path
) -> None:
    module(tmp_path, project.folder / "workflow" / "Snakefile")
    run = start(plain / "snakemake", tmp_path, "--", THEORY)
    assert run.returncode != 0
    assert "lacks torch" in run.stdout
    assert "Finished jobid" not in run.stdout
    assert not (tmp_path / "results").exists()


def test_what_a_module_is_given_is_named(project: Project, tmp_path: Path) -> None:
    module(tmp_path, project.folder / "workflow" / "Snakefile")
    (tmp_path / "config" / "config.yaml").write_text("results: results\n", encoding="utf-8")
    run = start(HERE, tmp_path, "--dry-run")
    assert run.returncode != 0
    said = "the configuration that the module is given (config/config.yaml): key experiments: missing; add it"
    assert said in run.stdout


def test_a_workflow_that_cannot_be_written_runs_in_another_folder(
    project: Project, finished: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    given = (
        "-s",
        f"{project.folder}/workflow/Snakefile",
        "--configfile",
        f"{project.folder}/config/smoke.yaml",
    )
    run = start(HERE, folder, *given, "--", THEORY, MODEL, read_only=project.folder)
    assert run.returncode == 0, run.stdout
    assert_same(folder, finished, [THEORY, MODEL])


def test_files_of_the_user_come_before_those_of_the_workflow(project: Project, tmp_path: Path) -> None:
    """Experiments of one's own derive from the workflow's, or from another version of them."""
    folder = tmp_path / "config" / "experiments"
    folder.mkdir(parents=True)
    base = yaml.safe_load((ROOT / "config/experiments/risk_averse_2d.yaml").read_text(encoding="utf-8"))
    (folder / "risk_averse_2d.yaml").write_text(yaml.safe_dump({**base, "seeds": 7}), encoding="utf-8")
    own = {"label": "mild", "of": "novelty_2d", "methods": {"pretrained": {"kind": "pretrained"}}}
    study = {"name": "mine_2d", "title": "Mine", "seeds": 1, "study": {"axis": "mine", "cases": [own]}}
    (folder / "mine_2d.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    given = ("--config", "experiments=[risk_averse_2d, mine_2d]", "theory=[]")
    snakefile = str(project.folder / "workflow" / "Snakefile")
    run = start(HERE, tmp_path, "-s", snakefile, "--dry-run", *given, "--", "risk_averse_2d", "mine_2d")
    assert run.returncode == 0, run.stdout
    assert "runs/risk_averse_2d/pretrained/seed6" in run.stdout
    assert "input: config/experiments/mine_2d.yaml" in run.stdout


# ------------------------------------------------------------------------------------ bad input


def refused(project: Project, folder: Path, *arguments: str) -> str:
    run = start(HERE, folder, "-s", str(project.folder / "workflow" / "Snakefile"), "--dry-run", *arguments)
    assert run.returncode != 0, run.stdout
    assert "Traceback" not in run.stdout
    return run.stdout


def test_an_experiment_that_is_nowhere_is_named(project: Project, tmp_path: Path) -> None:
    said = refused(project, tmp_path, "--config", "experiments=[mine_2d]")
    assert "unknown experiment 'mine_2d', there is no config/experiments/mine_2d.yaml" in said
    assert "risk_averse_2d" in said  # one that the workflow has


@pytest.mark.parametrize("file", ["molecules/qm9_12.safetensors", "images/bridges"])
def test_a_resource_that_is_nowhere_is_named_at_planning(file: str, project: Project, tmp_path: Path) -> None:
    lost = project.folder / "resources" / file
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert f"resources/{file}" in refused(project, tmp_path)


def test_apptainer_without_its_image_is_refused(project: Project, tmp_path: Path) -> None:
    said = refused(project, tmp_path, "--sdm", "apptainer")
    assert "envs/flowtilt.sif, which is not there: build it by `apptainer build" in said
    (project.folder / "envs" / "flowtilt.sif").write_bytes(b"")
    assert "ask for one of the two" in refused(project, tmp_path, "--sdm", "conda", "apptainer")


def test_packages_that_a_job_lacks_are_named_in_its_log(plain: Path, project: Project) -> None:
    """Where its run was not checked as it began: Snakemake's --no-hooks leaves that out."""
    command = project.folder / "workflow" / "bin" / "flowtilt"
    run = subprocess.run(
        [command, "theory", str(ROOT / "config/theory/threshold.yaml"), "--output", "x.json"],
        env={**os.environ, "PATH": f"{plain}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "lacks it: add --use-conda" in run.stderr
    assert "Traceback" not in run.stderr
