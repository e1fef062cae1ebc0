"""What the rules share: the checked configuration, and the runs and files that it stands for."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import snakemake.benchmark
from snakemake.exceptions import WorkflowError
from snakemake.jobs import GroupJob
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod
from snakemake.utils import validate

try:
    from flowtilt import slurm
    from flowtilt.configuration import ConfigError
    from flowtilt.experiment import (
        AnyExperiment,
        FunctionalExperiment,
        TailExperiment,
        dump,
        load_file,
        read_study,
        stage_digest,
    )
    from flowtilt.files import atomic_path
    from flowtilt.image_experiment import ImageExperiment
    from flowtilt.molecule_experiment import MoleculeExperiment
    from flowtilt.stages.checking import check_functional
    from flowtilt.theory.config import TheoryConfig, load_theory
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"{error}: the environment that runs Snakemake must hold the package flowtilt; "
        "make one with `make env`, or run `pip install -e .` in your own"
    ) from None

# By default, in a job's first seconds, Snakemake asks for its memory twice a second. With two jobs of torch,
# Snakemake then took 13 % of a core; asking every two seconds, 2 %.
snakemake.benchmark.BENCHMARK_INTERVAL_SHORT = 2.0

# Of a submission that is shared, Snakemake does not print why SLURM refused or ended it.
log_group_error = GroupJob.log_error


def log_error(self, msg=None, **kwargs) -> None:
    if msg:
        logger.error(msg)
    log_group_error(self, msg, **kwargs)


GroupJob.log_error = log_error

# Jobs call the command of the environment that runs Snakemake, whether it is activated or not.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


# The configuration


def config_files() -> str:
    """The configuration files in use, the one that has the last word first."""
    return ", ".join(os.path.relpath(path) for path in workflow.configfiles)


def check_config(schema: str) -> None:
    """Validate the configuration; an error says in one sentence which key is wrong, and why."""
    try:
        validate(config, schema)
    except WorkflowError as error:
        wrong = error.__context__
        key = ".".join(str(part) for part in wrong.absolute_path) or "(top level)"
        known = ", ".join(wrong.schema.get("properties", {}))
        hint = f"known keys: {known}" if known else wrong.schema.get("description", "")
        raise WorkflowError(f"{config_files()}: key {key}: {wrong.message} ({hint})") from None


def experiment_file(name: str) -> str:
    return f"config/experiments/{name}.yaml"


def theory_file(name: str) -> str:
    return f"config/theory/{name}.yaml"


def load_experiments(name: str, where: str) -> dict[str, AnyExperiment]:
    """The experiments of one file; ``where`` says which file and key name it."""
    file = Path(experiment_file(name))
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise WorkflowError(f"{where}: unknown experiment {name!r}, there is no {file} (known: {known})")
    try:
        return load_file(file, config["overrides"])
    except ConfigError as error:
        message = str(error)
    try:
        load_file(file)
    except ConfigError:
        raise WorkflowError(message) from None
    raise WorkflowError(f"{config_files()}: key overrides: merged into {message}")


def load_all() -> dict[str, dict[str, AnyExperiment]]:
    """Every file that is needed, by name: those to run, the study of the resolution, and their bases."""
    files = {
        name: load_experiments(name, f"{config_files()}: key experiments") for name in config["experiments"]
    }
    for key in ("skip", "files"):
        for name in config["overrides"].get(key, {}):
            if not Path(experiment_file(name)).is_file():
                raise WorkflowError(
                    f"{config_files()}: key overrides.{key}.{name}: there is no {experiment_file(name)}"
                )
    study = config["resolution"]
    where = f"{config_files()}: key resolution"
    files.setdefault(study, load_experiments(study, where))
    if not any(method.kind == "am" for case in files[study].values() for method in case.methods.values()):
        raise WorkflowError(
            f"{where}: {study} has no method of kind am to measure the network's resolution by; "
            "name a study that has"
        )
    bases = {case.base: name for name, cases in files.items() for case in cases.values()}
    for base, name in bases.items():
        where = f"{experiment_file(name)}: key base"
        files.setdefault(base, load_experiments(base, where))
        if base not in files[base]:
            raise WorkflowError(f"{where}: {base} is a study; name one experiment")
    check_shared(files)
    return files


def check_shared(files: dict[str, dict[str, AnyExperiment]]) -> None:
    """Refuse cases on molecules that would change what they share with the experiment they derive from."""
    for name, cases in files.items():
        for case in cases.values():
            if not isinstance(case, MoleculeExperiment):
                continue
            base = files[case.base][case.base]
            for stage in ("pretrain", "offline"):
                for key in base.stage_sections[stage]:
                    if key != "solver" and getattr(case, key) != getattr(base, key):
                        raise WorkflowError(
                            f"{experiment_file(name)}: key {key}: {case.name} has the pretrained model and "
                            f"the offline batch of {case.base}, and so must have the same {key}; make it an "
                            "experiment of its own"
                        )
            check_also(name, case, base)
            if case.solver.steps != base.solver.steps:
                raise WorkflowError(
                    f"{experiment_file(name)}: key solver.steps: {case.name} has the offline batch of "
                    f"{case.base}, and so must have the same steps"
                )


def check_also(name: str, case: MoleculeExperiment, base: MoleculeExperiment) -> None:
    """Refuse methods of the base that a case takes as its own if they are solved otherwise, or left out."""
    for method in case.also:
        where = f"{experiment_file(name)}: key study.cases: {case.name}: also: {method}"
        if method not in base.methods:
            raise WorkflowError(
                f"{where} is left out of {base.name} (overrides.skip); leave out the case too"
            )
        solver = base.solver_of(method).model_copy(update={"updates": base.updates_of(method)})
        if solver != case.solver:
            raise WorkflowError(
                f"{where} is solved by another solver in {base.name}; give both the same, or run it in the "
                "case under a name of its own"
            )


def check_functionals(experiments) -> None:
    """Refuse functionals that no job could use, before any job starts.

    In a process of its own: torch would stay in this one, which every job is started from.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for experiment in experiments:
            try:
                process.submit(check_functional, experiment).result()
            except ConfigError as error:
                raise WorkflowError(f"{experiment_file(experiment.name.split('/')[0])}: {error}") from None


def is_of(kind: type, name: str) -> bool:
    """Whether all experiments of a file are of one kind."""
    return all(isinstance(experiment, kind) for experiment in FILES[name].values())


def check_folder() -> None:
    """Refuse a folder in which Snakemake could not keep its records: it ends in a traceback, in dry runs too."""
    records = Path(".snakemake")
    if not os.access(records if records.exists() else Path(), os.W_OK):
        raise WorkflowError(
            f"{records.absolute()}: cannot be written, and Snakemake keeps its records there even of a dry run; "
            "give yourself the right to, or copy the project to a folder that you can write to"
        )


def check_conda() -> None:
    """Refuse to deploy software by conda where there is none."""
    if {*workflow.deployment_settings.deployment_method} == {DeploymentMethod.CONDA} and not shutil.which(
        "conda"
    ):
        raise WorkflowError(
            "--software-deployment-method conda (--use-conda): no command conda was found; install Miniforge "
            "(https://conda-forge.org/download) and put its conda on the PATH, or leave the option out and "
            "run in the environment that `make env` makes"
        )


def load_theories() -> dict[str, TheoryConfig]:
    """The studies of the theory, by name."""
    if unknown := set(config["theory_overrides"]) - set(config["theory"]):
        raise WorkflowError(
            f"{config_files()}: key theory_overrides.{min(unknown)}: no such study in key theory "
            f"({', '.join(config['theory'])})"
        )
    studies = {}
    for name in config["theory"]:
        try:
            studies[name] = load_theory(theory_file(name), config["theory_overrides"].get(name))
        except ConfigError as error:
            where = "key theory_overrides, merged into " if name in config["theory_overrides"] else ""
            raise WorkflowError(f"{config_files()}: {where}{error}") from None
    return studies


try:
    check_folder()
    check_conda()
    check_config("../schemas/config.schema.yaml")
    FILES = load_all()
    if workflow.is_main_process:  # and not that of one job on a cluster
        check_functionals(
            experiment
            for cases in FILES.values()
            for experiment in cases.values()
            if isinstance(experiment, FunctionalExperiment)
        )
    THEORY = load_theories()
except WorkflowError as error:
    raise error.with_traceback(None) from None  # the message says where to look, frames would not

STUDIES = [name for name, cases in FILES.items() if name not in cases]
EXPERIMENTS = {name: experiment for cases in FILES.values() for name, experiment in cases.items()}
TAILS = [name for name, experiment in EXPERIMENTS.items() if isinstance(experiment, TailExperiment)]
MOLECULES = [name for name, experiment in EXPERIMENTS.items() if isinstance(experiment, MoleculeExperiment)]
MOLECULE_FILES = [name for name in FILES if is_of(MoleculeExperiment, name)]
IMAGES = [name for name, experiment in EXPERIMENTS.items() if isinstance(experiment, ImageExperiment)]
PICTURE_MODELS = sorted({EXPERIMENTS[name].model.name for name in IMAGES})
PLANAR = [name for name in EXPERIMENTS if name not in MOLECULES and name not in IMAGES]
PLANAR_FILES = [name for name in FILES if name not in MOLECULE_FILES and name not in IMAGES]
FUNCTIONAL_FILES = [name for name in FILES if is_of(FunctionalExperiment, name)]
METHODS = sorted({method for experiment in EXPERIMENTS.values() for method in experiment.methods})
RESOLVED = {name: dump(experiment) for name, experiment in EXPERIMENTS.items()}
OVERRIDES = json.dumps(config["overrides"], sort_keys=True)


# A file at its content's address: whoever else reads the workflow meanwhile cannot change what a job reads.
CONFIG_FILES = {
    name: Path(
        config["results"], "configs", name, f"{hashlib.sha256(resolved.encode()).hexdigest()[:16]}.yaml"
    )
    for name, resolved in RESOLVED.items()
}


def write_configs() -> None:
    """Write the resolved configurations that are not there, as a run begins.

    Jobs go by the digest of the sections that they use, and so do not have them as input.
    """
    for name, path in CONFIG_FILES.items():
        if not path.is_file():
            with atomic_path(path) as temporary:
                temporary.write_text(RESOLVED[name])


def check_configs() -> None:
    """In a job on a cluster, which reads the workflow again: refuse another configuration than the run's."""
    if missing := [str(path) for path in CONFIG_FILES.values() if not path.is_file()]:
        raise WorkflowError(
            f"there is no {missing[0]}: the configuration has changed since this run was started, or this "
            "machine cannot see the folder that it was started in; start the run again"
        )


def config_file(wildcards, output) -> str:
    """The configuration that a job reads. Since it takes ``output``, Snakemake compares no earlier value."""
    return str(CONFIG_FILES[wildcards.experiment])


def config_files_of(file: str):
    """Those that a job on all experiments of a file reads."""
    return lambda wildcards, output: [str(CONFIG_FILES[name]) for name in FILES[file]]


if not workflow.is_main_process:
    check_configs()


# Resources


def growing(short: int, long: int | None = None):
    """What a job may take: if jobs are short, or long; twice and three times as much when it is tried again."""
    asked = long if config["job_length"] == "long" and long is not None else short
    return lambda wildcards, attempt: asked * attempt


def short(group: str) -> str | None:
    """The group whose jobs share a submission to a cluster; long jobs, and those with a GPU, have one each."""
    return None if config["job_length"] == "long" or config["gpu"] else group


def check_cluster() -> None:
    """Refuse what a SLURM cluster could not run, before anything is submitted.

    Without an accounting database, the command that asks for the state of jobs becomes one that can tell.
    """
    if workflow.executor_plugin.name != "slurm":
        return
    settings = workflow.executor_settings
    needed = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    submissions = {workflow.dag.get_job_group(job) or job for job in needed}
    try:
        cluster = slurm.ask_cluster()
        # Partitions can also be left to the plugin, in a file of their limits.
        if not (settings.partition_config or os.environ.get("SNAKEMAKE_SLURM_PARTITIONS")):
            slurm.check_submissions(cluster, [(job.name, dict(job.resources.items())) for job in submissions])
        settings.status_command = slurm.status_command(
            cluster, settings.status_command, settings.init_seconds_before_status_checks
        )
    except slurm.ClusterError as error:
        raise WorkflowError(str(error)) from None


# Parameters


def one_of(names) -> str:
    """A regular expression that matches just the given names, or nothing if there are none."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def digest(stage: str):
    """Hash of what a stage reads of a job's experiment: the job runs again when it changes."""
    return lambda wildcards: stage_digest(EXPERIMENTS[wildcards.experiment], stage, wildcards.get("method"))


def options(*names: str):
    """Command-line options for those of the named inputs that a job has."""
    return lambda wildcards, input: " ".join(
        f"--{name} {shlex.quote(str(input[name]))}" for name in names if name in input.keys()
    )


# What stands before the command of a fine-tuning that several processes share.
TOGETHER = ""
if config["processes"] > 1:
    TOGETHER = f"torchrun --standalone --nproc-per-node {config['processes']} --no-python "


def threads_of_each(wildcards, threads) -> int:
    """Threads of each of the processes that share a job."""
    return max(1, threads // config["processes"])


def theory_overrides(wildcards) -> str:
    return json.dumps(config["theory_overrides"].get(wildcards.theory, {}), sort_keys=True)


def results_folder(wildcards) -> str:
    return config["results"]


def config_hash() -> str:
    """Hash of all that is configured: the experiments, and which of them are run."""
    chosen = {key: config[key] for key in ("experiments", "resolution")}
    theory = {name: study.model_dump() for name, study in THEORY.items()}
    return hashlib.sha256(json.dumps([chosen, RESOLVED, theory], sort_keys=True).encode()).hexdigest()


# Files; Snakemake fills in what is in angle brackets, see `pathvars`


def kind_of(wildcards) -> str:
    """The kind of a job's method: pretrained, am, fdc or tfft; on molecules also data."""
    methods = EXPERIMENTS[wildcards.experiment].methods
    if wildcards.method not in methods:
        known = ", ".join(methods)
        raise WorkflowError(f"{wildcards.experiment} has no method {wildcards.method!r} (known: {known})")
    return methods[wildcards.method].kind


def run_folder(experiment: str, method: str, seed: int | str) -> str:
    return f"<results>/runs/{experiment}/{method}/seed{seed}"


def base_folder(wildcards) -> str:
    """Folder of the pretrained model that a job's experiment starts from."""
    return run_folder(EXPERIMENTS[wildcards.experiment].base, "pretrained", wildcards.seed)


def base_model(wildcards) -> str:
    return f"{base_folder(wildcards)}/model.safetensors"


def base_density(wildcards) -> str:
    return f"{base_folder(wildcards)}/density.npz"


def finetune_inputs(wildcards) -> dict[str, str]:
    """What a run needs beyond the pretrained model: a threshold, or the model of an earlier run."""
    if kind_of(wildcards) == "tfft":
        return {"threshold": f"{run_folder(**wildcards)}/threshold.json"}
    start = EXPERIMENTS[wildcards.experiment].methods[wildcards.method].continue_from
    if start is None:
        return {}
    return {"start": f"{run_folder(wildcards.experiment, start, wildcards.seed)}/model.safetensors"}


def resolution_runs(file: str) -> list[str]:
    """One file of each Adjoint Matching run that the network's resolution is measured from."""
    return [
        file.format(experiment=experiment.name, base=experiment.base, method=method, seed=seed)
        for experiment in FILES[config["resolution"]].values()
        for method, settings in experiment.methods.items()
        if settings.kind == "am"
        for seed in experiment.seeds
    ]


# Molecules: one pretrained model for all seeds, and one offline batch a seed for all methods


def shared_folder(wildcards) -> str:
    """Folder of what all methods of a job's experiment start from, in the experiment that it derives from."""
    return f"<results>/runs/{EXPERIMENTS[wildcards.experiment].base}/pretrained"


def checkpoint_of(wildcards) -> list[str]:
    """The shipped weights and their record, if the pretrained model is taken from them and they are there."""
    shipped = EXPERIMENTS[wildcards.experiment].checkpoint
    files = [] if shipped.retrain else [Path(shipped.path), Path(shipped.path).with_suffix(".json")]
    return [str(file) for file in files if file.is_file()]


def threshold_input(wildcards) -> dict[str, str]:
    if kind_of(wildcards) != "tfft":
        return {}
    return {"threshold": f"{run_folder(**wildcards)}/threshold.json"}


def sample_molecules_inputs(wildcards) -> dict[str, str]:
    """What the molecules of a run are drawn from: data, the pretrained model, or the run's own."""
    kind = kind_of(wildcards)
    if kind == "data":
        return {"molecules": "<results>/data/qm9.npz"}
    folder = shared_folder(wildcards) if kind == "pretrained" else run_folder(**wildcards)
    return {"model": f"{folder}/model.safetensors"}


def training_inputs(wildcards) -> dict[str, str]:
    """What the evaluation of a run reads beside its molecules."""
    kind, inputs = kind_of(wildcards), {}
    if kind not in ("data", "pretrained"):
        inputs["history"] = f"{run_folder(**wildcards)}/history.csv"
    if kind == "tfft":
        inputs["threshold"] = f"{run_folder(**wildcards)}/threshold.json"
    return inputs


def molecule_files(experiment: MoleculeExperiment) -> list[str]:
    """Files of all runs of an experiment on molecules."""
    base = f"<results>/runs/{experiment.base}/pretrained"
    files = [f"{base}/model.safetensors", f"{base}/training.json"]
    for seed in experiment.seeds:
        for method, settings in experiment.methods.items():
            made = ["samples.npz", "metrics.json", "molecules.sdf", "energies.npz"]
            if settings.tuned:
                made = ["model.safetensors", "history.csv", *made]
            if settings.kind == "tfft":
                made = ["threshold.json", *made]
            files += [f"{run_folder(experiment.name, method, seed)}/{file}" for file in made]
    return files


def compared_files(experiment: MoleculeExperiment) -> list[str]:
    """Files that the table of a study of the level reads of the experiment that its cases derive from."""
    made = {"pretrained": ["metrics.json"], "am": ["metrics.json", "history.csv"]}
    made |= {method: ["metrics.json", "history.csv"] for method in experiment.also}
    return [
        f"{run_folder(experiment.base, method, seed)}/{file}"
        for seed in experiment.seeds
        for method, files in made.items()
        for file in files
    ]


# Pictures: one model for all seeds, and one offline batch a seed for all methods


def trained_for(model: str) -> str:
    """The first experiment that has a model: it says how the model is trained."""
    return next(name for name in IMAGES if EXPERIMENTS[name].model.name == model)


def check_models() -> None:
    """Refuse experiments of one model that would have it trained in two ways."""
    for name in IMAGES:
        first = trained_for(EXPERIMENTS[name].model.name)
        if EXPERIMENTS[name].model != EXPERIMENTS[first].model:
            raise WorkflowError(
                f"{experiment_file(name)}: key model: differs from that of {first}, which has the same name; give "
                "it another name, or leave both as their file has them"
            )


try:
    check_models()
except WorkflowError as error:
    raise error.with_traceback(None) from None


def model_inputs(wildcards) -> dict[str, str]:
    """What the check of a model waits for: its training, its fetching, or the shipped files."""
    experiment = EXPERIMENTS[wildcards.experiment]
    if experiment.retrain:
        folder = f"<results>/models/{experiment.model.name}"
        return {part: f"{folder}/{part}/weights" for part in ("pipeline", "alignment")}
    sources = [experiment.model.pipeline, experiment.model.alignment, experiment.reward.weights]
    if any(source is not None and source.hub is not None for source in sources):
        return {"fetched": f"<results>/runs/{experiment.name}/pretrained/fetched.json"}
    return {"shipped": shipped} if (shipped := shipped_files(experiment)) else {}


def shipped_files(experiment: ImageExperiment) -> list[str]:
    """Files of a model that are there, in an order that does not change."""
    sources = (experiment.model.pipeline, experiment.model.alignment)
    files = [file for source in sources for file in sorted(Path(source.path).rglob("*.*")) if file.is_file()]
    return [str(file) for file in files]


def sample_images_inputs(wildcards) -> dict[str, str]:
    """The weights that the pictures of a run are drawn by, if they are not the pretrained model's."""
    if kind_of(wildcards) == "pretrained":
        return {}
    return {"weights": f"{run_folder(**wildcards)}/model.safetensors"}


def image_files(experiment: ImageExperiment) -> list[str]:
    """Files of all runs of an experiment on pictures."""
    files = [f"<results>/runs/{experiment.name}/pretrained/model.json"]
    for seed in experiment.seeds:
        for method, settings in experiment.methods.items():
            made = ["pictures", "metrics.json", "scores.npz"]
            if settings.tuned:
                made = ["model.safetensors", "history.csv", *made]
            if settings.kind == "tfft":
                made = ["threshold.json", *made]
            files += [f"{run_folder(experiment.name, method, seed)}/{file}" for file in made]
    return files


def model_file(name: str) -> str:
    """The file of an experiment's model, as it is named in the experiment's file or in what overrides it."""
    return f"config/models/{EXPERIMENTS[name].model.name}.yaml"


MADE_BY_KIND = {
    "pretrained": ["samples.npz", "metrics.json"],
    "am": ["model.safetensors", "history.csv", "samples.npz", "metrics.json"],
    "fdc": ["model.safetensors", "history.csv", "samples.npz", "metrics.json"],
    "tfft": ["threshold.json", "model.safetensors", "history.csv", "samples.npz", "metrics.json"],
}


def measured_runs(name: str) -> list[str]:
    """What the runs of a file are measured from, for any seed."""
    files = []
    for experiment in FILES[name].values():
        base = run_folder(experiment.base, "pretrained", "{seed}")
        files += [f"{base}/model.safetensors", f"{base}/density.npz"]
        for method, settings in experiment.methods.items():
            folder = run_folder(experiment.name, method, "{seed}")
            made = (
                file for file in MADE_BY_KIND[settings.kind] if file not in ("samples.npz", "metrics.json")
            )
            files += [f"{folder}/{file}" for file in made]
    return list(dict.fromkeys(files))


def measured_files(name: str) -> list[str]:
    """What the measurement of a file's runs writes, for any seed."""
    laws = [] if is_of(TailExperiment, name) else ["laws.npz"]
    return [
        f"{run_folder(experiment.name, method, '{seed}')}/{file}"
        for experiment in FILES[name].values()
        for method in experiment.methods
        for file in ["samples.npz", "metrics.json", *laws]
    ]


def run_files(name: str, *kinds: str) -> list[str]:
    """Files of all runs that the table and the figures of an experiment file rest on.

    Args:
        name: of the experiment file.
        kinds: names of files, such as ``metrics.json``; all if none is given.
    """
    files = []
    for experiment in FILES[name].values():
        if name in MOLECULE_FILES:
            files += molecule_files(experiment)
            continue
        if name in IMAGES:
            files += image_files(experiment)
            continue
        for seed in experiment.seeds:
            base = run_folder(experiment.base, "pretrained", seed)
            files += [f"{base}/model.safetensors", f"{base}/density.npz"]
            for method, settings in experiment.methods.items():
                folder = run_folder(experiment.name, method, seed)
                files += [f"{folder}/{file}" for file in MADE_BY_KIND[settings.kind]]
                if not experiment.solved_apart:
                    files.append(f"{folder}/laws.npz")
            for rows in experiment.layers[1:] if experiment.solved_apart else ():
                folder = run_folder(experiment.name, rows, seed)
                files += [f"{folder}/metrics.json", f"{folder}/laws.npz"]
    return [file for file in dict.fromkeys(files) if not kinds or Path(file).name in kinds]


def read_by_table(name: str) -> list[str]:
    """What the table and the figure of a file are made from: metrics, and for solvers their costs as well."""
    study = read_study(Path(experiment_file(name)))
    if study is not None and name in MOLECULE_FILES:
        cases = FILES[name].values()
        compared = [file for case in cases for file in compared_files(case)]
        return list(dict.fromkeys([*run_files(name, "metrics.json", "history.csv"), *compared]))
    costs = study is not None and study.study.table == "solvers"
    return run_files(name, "metrics.json", *(["history.csv"] if costs else []))


def tables_of(name: str) -> list[str]:
    return [f"<results>/tables/{name}.{extension}" for extension in ("csv", "md", "tex")]


def figures_of(name: str) -> list[str]:
    if name in STUDIES:
        return [f"<results>/figures/{name}.png"]
    if name in MOLECULE_FILES:
        kinds = ("energies", "molecules")
    elif name in IMAGES:
        kinds = ("pictures", "scores")
    elif is_of(TailExperiment, name):
        kinds = ("landscape", "densities", "histograms")
    else:
        kinds = ("densities", "metrics")
    return [f"<results>/figures/{name}_{kind}.png" for kind in kinds]


def for_all(files_of) -> list[str]:
    """The files of all experiment files that are run, each once."""
    return list(dict.fromkeys(file for name in config["experiments"] for file in files_of(name)))


# Targets ask for the runs' files too: Snakemake otherwise takes tables that are there, as in a fresh
# clone, for a sign that nothing is left to do.
RUNS = [*for_all(run_files), "<results>/resolution.json", *(f"<results>/theory/{n}.json" for n in THEORY)]
TABLES = [*for_all(tables_of), "<results>/tables/comparison.csv", "<results>/tables/by_seed.csv"]
TABLES += tables_of("costs")
TABLES += [file for name in THEORY for file in tables_of(f"theory_{name}")]
PAGES = [f"<results>/pages/{name}.html" for name in config["experiments"]]
PAGES += [f"<results>/pages/theory_{name}.html" for name in THEORY]
PAGES += [f"<results>/pages/{name}.html" for name in ("comparison", "costs", "provenance")]
FIGURES = [*for_all(figures_of), *(f"<results>/figures/theory_{name}.png" for name in THEORY)]
MODELS = [
    file
    for file in RUNS
    if Path(file).match("pretrained/*/model.safetensors") or Path(file).match("pretrained/model.safetensors")
]
