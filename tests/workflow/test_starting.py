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
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from environments import StandInConda, make_environment
from starting import HERE, MODEL, THEORY, assert_same, module, start
from workflow_copy import ROOT, SHORT, SMOKE, Project

TABLE = "results/smoke/tables/entropy_2d.csv"


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
        little = ("--config", "theory=[]", "experiments=[risk_averse_2d]")
        run = start(plain / "snakemake", folder, *arguments, "--dry-run", *little)
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
        str(file.relative_to(project.folder))
        for file in project.smoke.glob("runs/entropy_2d/*/*/metrics.json")
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
    shared = ("--use-conda", "--conda-prefix", str(tmp_path / "shared"), *SHORT, "--", THEORY)
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
    run = start(HERE, project.folder, *SHORT, "--", THEORY, MODEL)
    assert run.returncode == 0, run.stdout
    assert_same(project.folder, finished, [THEORY, MODEL])


def test_make_is_started_as_the_readme_says(project: Project, finished: Project) -> None:
    """On one core, where the run that it is compared with had two."""
    words = line("make results")
    shutil.copy(ROOT / "Makefile", project.folder)
    environment = Path(sys.prefix)
    # With the environment that is there; pip's part takes gigabytes.
    given = [f"VENV={environment}", "--assume-old", f"{environment}/.complete", "CORES=1"]
    shown = subprocess.run(
        [*words, *given, "--dry-run"], cwd=project.folder, capture_output=True, text=True, check=True
    )
    command = shown.stdout.splitlines()[-1]
    assert command.startswith(
        f"{environment}/bin/snakemake --workflow-profile workflow/profiles/default --cores 1"
    )
    run = start(HERE, project.folder, *shlex.split(command)[1:], *SHORT, "--", THEORY, MODEL)
    assert run.returncode == 0, run.stdout
    assert_same(project.folder, finished, [THEORY, MODEL])


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
        plain / "snakemake", project.folder, *line("--sdm apptainer")[3:], *SHORT, "--", THEORY, conda=engine
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
    for shell, script in (("sh", "install.sh"), ("bash", "check-image.sh")):
        subprocess.run([shell, "-n", ROOT / "envs" / script], check=True)
    # The steps that check-image.sh takes, and those that it can leave out.
    steps = {line.split()[0] for line in texts[0].splitlines() if line and not line.startswith("#")}
    assert steps == {"WORKDIR", "COPY", "ENV", "RUN"} | {"FROM", "ARG", "CMD"}


# ----------------------------------------------------------------------------------- any folder


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


def test_a_module_can_be_named_by_the_site_that_hosts_it(
    project: Project, finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site is a folder here; its commit, and no other one, is what runs."""
    hosted = tmp_path / "site" / "group" / "flowtilt"
    shutil.copytree(project.folder, hosted)
    stage = hosted / "src" / "flowtilt" / "pipeline" / "theory" / "stage.py"
    sources = stage.read_text(encoding="utf-8")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", hosted]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for tag, text in (("v1", sources), ("v2", "raise RuntimeError('of another tag')\n")):
        stage.write_text(text, encoding="utf-8")
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", tag], check=True)
        subprocess.run([*git, "tag", tag], check=True)
    settings = tmp_path / "gitconfig"
    settings.write_text(
        f'[url "{tmp_path}/site/"]\n    insteadOf = https://code.example/\n', encoding="utf-8"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for tag, status in (("v1", 0), ("v2", 1)):
        folder = tmp_path / tag
        folder.mkdir()
        site = 'gitlab("group/flowtilt", path="workflow/Snakefile", tag="{}", host="code.example")'
        module(folder, site.format(tag))
        run = start(HERE, folder, "--", THEORY)
        assert run.returncode == status, run.stdout
        log = (folder / "results" / "smoke" / "logs" / "theory" / "threshold.log").read_text(encoding="utf-8")
        assert ("of another tag" in log) == (tag == "v2")
    assert_same(tmp_path / "v1", finished, [THEORY])


def test_a_module_of_single_files_is_refused_without_the_package(
    plain: Path, project: Project, tmp_path: Path
) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(project.folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        module(tmp_path, f'"http://127.0.0.1:{server.server_port}/workflow/Snakefile"')
        run = start(plain / "snakemake", tmp_path, "--dry-run")
        server.shutdown()
    assert run.returncode == 1
    assert "No module named 'flowtilt': the workflow was fetched file by file" in run.stdout
    assert "Name it by github(...) or gitlab(...)" in run.stdout
    assert "Traceback" not in run.stdout


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
