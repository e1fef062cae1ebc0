"""The command line: one subcommand a stage, and those that put results into tables and figures.

The stages are those of all domains. Their jobs name no files: which ones they read and write below the
results follows from experiment, method and seed. Heavy imports wait until a stage is chosen, so that
``--help`` and the light stages start fast.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from flowtilt.environment import count
from flowtilt.loading import message_of
from flowtilt.pipeline.places import CURE, NEEDED

Handler = Callable[[argparse.Namespace], None]

log = logging.getLogger("flowtilt")


def run() -> int:
    """The command: :func:`main`, and a short way out. The interpreter's last act is to look for garbage among
    all objects, torch's million among them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not stream.isatty():  # a log, which others read as UTF-8
            stream.reconfigure(encoding="utf-8")
    # Libraries give the root logger a handler as they load: it would say every message a second time,
    # and the traceback after the advice. (Programs that call main keep theirs.)
    log.propagate = False
    code = main()
    gc.freeze()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; returns 0, or 1 after an error that the user can mend."""
    given = list(sys.argv[1:] if argv is None else argv)
    _start_logging()
    try:
        arguments = _parser(given).parse_args(given)
    except ValueError as error:  # of a domain that cannot be used
        log.error("flowtilt: %s", error)
        return 1
    gc.disable()  # importing torch makes a million objects that stay
    try:
        arguments.handler(arguments)
        if "flowtilt.parallel" in sys.modules:  # which imports torch, and many stages do not
            sys.modules["flowtilt.parallel"].leave_processes()
    except KeyboardInterrupt:
        log.error("interrupted; outputs that were not finished were not written")
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in NEEDED:
            message = f"{error}; {sys.executable} lacks it: {CURE}"
        else:
            message = message_of(error, ValueError, RuntimeError, ArithmeticError, OSError, MemoryError)
        log.debug("traceback", exc_info=True)
        log.error("%s: %s%s", arguments.stage, message, _advice(error))
        return 1
    log.info("%s: done", arguments.stage)
    return 0


_NO_MEMORY = ("out of memory", "allocate memory")
_NO_SPACE = ("No space left", "quota exceeded", "File too large")
"""Words of errors by torch, safetensors and the system."""


def _advice(error: BaseException) -> str:
    """What to do about an error of the machine; nothing for others, whose messages say it themselves."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return (
            " (not enough memory; lower solver.batch or solver.pool, or give the job more: "
            "--set-resources RULE:mem_mb=...)"
        )
    if not isinstance(error, OSError):
        return ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(words in text for words in _NO_SPACE):
        return " (the disk is full; free space and run again: what was finished before is kept)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return " (no file can be written there; set the key results to a folder that you can write to)"
    return ""


def _start_logging() -> None:
    """Messages go to standard error."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)


class Command(NamedTuple):
    """A stage of the pipeline's own.

    Attributes:
        text: what it does.
        action: ``module:function`` that does it.
        arguments: what that is called with, in this order; see :data:`ARGUMENTS`.
    """

    text: str
    action: str
    arguments: tuple[str, ...]


_REPORT = "flowtilt.pipeline.report"
_FILE = ("file", "--override", "--results", "--reported", "--output-prefix")
COMMANDS = {
    "doctor": Command(
        "Say what this machine, or the cluster it submits to, can run of a plan.",
        "flowtilt.pipeline.cli:doctor",
        ("--configfile", "--partition", "--gpu"),
    ),
    "resolve": Command(
        "Validate a file and write one of its experiments, overrides merged in.",
        "flowtilt.pipeline.cli:resolve",
        ("file", "--name", "--override", "--output"),
    ),
    "check": Command("Refuse experiments that no job could use.", "flowtilt.pipeline.cli:check", ("config",)),
    "table": Command("Write an experiment's or a study's table.", f"{_REPORT}.tables:write_table", _FILE),
    "figures": Command("Draw an experiment's or a study's figures.", f"{_REPORT}.style:write_figures", _FILE),
    "compare": Command(
        "Write the comparison with the papers' values.",
        f"{_REPORT}.tables:write_comparison",
        ("files", "--override", "--results", "--reported", "--output", "--by-seed", "--earlier"),
    ),
    "costs": Command(
        "Write what the runs cost, from the workflow's benchmarks.",
        f"{_REPORT}.costs:write_costs",
        ("files", "--override", "--benchmarks", "--output-prefix", "--earlier"),
    ),
    "theory": Command(
        "Check the papers' guarantees on distributions that are known exactly.",
        "flowtilt.pipeline.theory.stage:run",
        ("study", "--override", "--output"),
    ),
    "theory-report": Command(
        "Write a theory study's table and figure.",
        "flowtilt.pipeline.theory.stage:report",
        ("result", "--output-prefix", "--figure"),
    ),
    "provenance": Command(
        "Record what made the results.",
        f"{_REPORT}.provenance:write_provenance",
        ("--config-hash", "--benchmarks", "--output", "--earlier", "--environment", "--snakemake"),
    ),
    "versions": Command(
        "Record the versions of the packages of this environment.",
        f"{_REPORT}.provenance:write_versions",
        ("--output",),
    ),
    "page": Command(
        "Write a table, the comparison or the provenance as an HTML page.",
        f"{_REPORT}.pages:write_page",
        ("source", "--title", "--output"),
    ),
    "overview": Command(
        "Write the pages of the comparison, the costs and the provenance.",
        f"{_REPORT}.pages:write_overview",
        ("sources", "--output-folder"),
    ),
    "config-reference": Command(
        "Write the reference of all configuration keys.",
        "flowtilt.pipeline.config_reference:write_reference",
        ("--output",),
    ),
}
"""By name."""


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON mapping")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    from flowtilt.pipeline.configuration import no_repeats

    no_repeats([f"key {key}" for key, _ in pairs])
    return dict(pairs)


def _file(text: str, **more: Any) -> dict[str, Any]:
    return {"type": Path, "help": text, **more}


ARGUMENTS: dict[str, dict[str, Any]] = {
    "config": _file("experiments' files, resolved or as written", nargs="+"),
    "file": _file("a file of config/experiments"),
    "files": _file("files of config/experiments", nargs="+"),
    "result": _file("output of the stage theory"),
    "source": _file("a table's .md, comparison.csv, or provenance.json"),
    "sources": _file("comparison.csv, costs.md, provenance.json", nargs="+"),
    "study": _file("a file of config/theory"),
    "--benchmarks": _file("folder of the workflow's benchmarks", required=True),
    "--by-seed": _file("file for every metric of every seed", required=True),
    "--config-hash": {"help": "of the workflow's configuration", "required": True},
    "--configfile": _file("as for Snakemake: over config/config.yaml", nargs="+", default=[]),
    "--earlier": _file("the same file of a run whose other results are kept (of a comparison, by_seed.csv)"),
    "--environment": _file("versions of each environment of the run", nargs="*", default=[]),
    "--figure": _file("figure to write (png)", required=True),
    "--gpu": {"type": int, "help": "GPUs of a job (doctor: over the configuration's)"},
    "--method": {"default": "", "help": "name of one of the experiment's methods"},
    "--name": {"help": "the experiment or case; may be left out for an ordinary file"},
    "--output": _file("file to write", required=True),
    "--output-folder": _file("for pages of the same names", required=True),
    "--output-prefix": _file("of the files to write", required=True),
    "--override": {"type": _mapping, "default": {}, "help": "JSON mapping, merged in last"},
    "--partition": {"help": "of SLURM (default: $SBATCH_PARTITION)"},
    "--reported": _file("table of the papers' values", required=True),
    "--results": _file("folder of all results", required=True),
    "--seed": {"type": int, "help": "seed of the run"},
    "--snakemake": {"default": "", "help": "its version, where it has an environment of its own"},
    "--title": {"default": "", "help": "of a table's page"},
    "--workers": {"type": int, "help": "processes beside its own"},
}
"""What stages are given: as argparse has it, by name."""

OF_RUN = ("config", "--method", "--seed", "--results", "--workers", "--gpu")
"""Of a stage of domains."""


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; domains are loaded for their stages alone, if ``given`` begins with no other name."""
    parser = argparse.ArgumentParser(
        prog="flowtilt", description="Fine-tune flow models beyond the average reward, one stage at a time."
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def add(name: str, text: str, arguments: Sequence[str], handler: Handler) -> None:
        stage = stages.add_parser(name, help=text, description=text)
        stage.set_defaults(handler=handler)
        for argument in arguments:
            stage.add_argument(argument, **ARGUMENTS[argument])

    for name, command in COMMANDS.items():
        add(name, command.text, command.arguments, partial(_call, command))
    if not given or given[0] not in stages.choices:
        for name, domains in _stages().items():
            add(name, f"A stage of experiments of {domains}.", OF_RUN, _run_stage)
    return parser


def _call(command: Command, a: argparse.Namespace) -> None:
    from flowtilt.pipeline.domain import imported

    given = (getattr(a, name.lstrip("-").replace("-", "_")) for name in command.arguments)
    imported(command.action)(*given)


def _stages() -> dict[str, str]:
    """The stages of all domains that can be loaded, and the domains that have each."""
    from flowtilt.pipeline.domain import known_domains

    found: dict[str, list[str]] = {}
    for domain in known_domains():
        for stage in domain.stages:
            found.setdefault(stage.name, []).append(domain.name)
    return {name: ", ".join(dict.fromkeys(domains)) for name, domains in found.items()}


def _run_stage(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.domain import imported, job_of
    from flowtilt.pipeline.experiment import load_resolved
    from flowtilt.pipeline.progress import Bar

    experiments = [load_resolved(file) for file in a.config]
    stage, job = job_of(a.stage, experiments, a.method, a.seed, a.results, a.workers)
    job = replace(job, bar=Bar)
    if stage.needs.gpu or stage.networks:
        prepare_torch(gpu=stage.needs.gpu)
    if a.gpu:
        from flowtilt.devices import check_gpus

        check_gpus(a.gpu)
    imported(stage.action)(job)


def check(config: Sequence[Path]) -> None:
    """Refuse experiments that no job could use, by their domains."""
    from flowtilt.pipeline.domain import domain_of, imported
    from flowtilt.pipeline.experiment import load_resolved

    for file in config:
        experiment = load_resolved(file)
        if verify := domain_of(experiment).verify:
            imported(verify)(experiment)


def doctor(configfile: Sequence[Path], partition: str | None, gpu: int | None) -> None:
    """Print what there is to run a configuration on."""
    from flowtilt.pipeline.doctor import examine

    for line in examine(configfile, partition or os.environ.get("SBATCH_PARTITION", ""), gpu):
        print(line)


def resolve(file: Path, name: str | None, override: dict[str, Any], output: Path) -> None:
    """Write one experiment of a file."""
    from flowtilt.files import write_text
    from flowtilt.pipeline.configuration import ConfigError
    from flowtilt.pipeline.experiment import dump, load_file

    experiments = load_file(file, override)
    name = name or (next(iter(experiments)) if len(experiments) == 1 else None)
    if name not in experiments:
        raise ConfigError(f"{file}: --name must be one of {', '.join(experiments)}")
    write_text(output, dump(experiments[name]))


def prepare_torch(gpu: bool = False) -> None:
    """Hold torch to the threads that the job was given, and take numbers below 1e-38 as zero.

    Gradients far out on a sigmoid's flank are that small, and a processor takes some thirty times as
    long over each. With ``gpu`` tensors live on the GPU that the job has, if it has one, and processes
    that were started together share the work, each on a GPU of its own.
    """
    import torch

    from flowtilt.devices import take_device
    from flowtilt.parallel import join_processes

    if gpu:
        join_processes()
        take_device()
    gc.enable()
    torch.set_num_threads(count("OMP_NUM_THREADS"))
    torch.set_flush_denormal(True)


if __name__ == "__main__":
    sys.exit(run())
