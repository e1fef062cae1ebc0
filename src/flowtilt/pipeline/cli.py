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
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from flowtilt.environment import count
from flowtilt.loading import message_of

Handler = Callable[[argparse.Namespace], None]

log = logging.getLogger("flowtilt")


def run() -> int:
    """The command: :func:`main`, and a short way out.

    The interpreter's last act is to look for garbage among all objects, torch's million among them.
    """
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


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; domains are loaded for their stages alone, if ``given`` begins with no other name."""
    parser = argparse.ArgumentParser(
        prog="flowtilt", description="Fine-tune flow models beyond the average reward, one stage at a time."
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def add(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        stage = stages.add_parser(name, help=text, description=text)
        stage.set_defaults(handler=handler)
        return stage

    stage = add("doctor", _doctor, "Say what this machine, or the cluster it submits to, can run of a plan.")
    stage.add_argument(
        "--configfile", type=Path, nargs="+", default=[], help="as for Snakemake: over config/config.yaml"
    )
    stage.add_argument("--partition", default=None, help="of SLURM (default: $SBATCH_PARTITION)")
    stage.add_argument("--gpu", type=int, default=None, help="GPUs of a job, over the configuration's")

    stage = add("resolve", _resolve, "Validate a file and write one of its experiments, overrides merged in.")
    stage.add_argument("file", type=Path, help="a file of config/experiments")
    stage.add_argument("--name", help="the experiment or case; may be left out for an ordinary file")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--output", type=Path, required=True)

    stage = add("check", _check, "Refuse experiments that no job could use.")
    stage.add_argument("config", type=Path, nargs="+", help=_CONFIG)

    for name, handler, text in (
        ("table", _table, "Write an experiment's or a study's table."),
        ("figures", _figures, "Draw an experiment's or a study's figures."),
    ):
        stage = add(name, handler, text)
        stage.add_argument("file", type=Path, help="a file of config/experiments")
        stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
        stage.add_argument("--results", type=Path, required=True, help="results folder to read")
        stage.add_argument("--reported", type=Path, required=True, help="table of the papers' values")
        stage.add_argument("--output-prefix", type=Path, required=True)

    stage = add("compare", _compare, "Write the comparison with the papers' values.")
    stage.add_argument("files", type=Path, nargs="+", help="files of config/experiments")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--results", type=Path, required=True, help="results folder to read")
    stage.add_argument("--reported", type=Path, required=True, help="table of the papers' values")
    stage.add_argument("--output", type=Path, required=True)
    stage.add_argument("--by-seed", type=Path, required=True, help="file for every metric of every seed")
    stage.add_argument("--earlier", type=Path, help="by_seed.csv of a run whose other experiments are kept")

    stage = add("costs", _costs, "Write what the runs cost, from the workflow's benchmarks.")
    stage.add_argument("files", type=Path, nargs="+", help="files of config/experiments")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--benchmarks", type=Path, required=True, help="folder of the workflow's benchmarks")
    stage.add_argument("--output-prefix", type=Path, required=True)
    stage.add_argument("--earlier", type=Path, help="costs.csv of a run whose other experiments are kept")

    stage = add("theory", _theory, "Check the papers' guarantees on distributions that are known exactly.")
    stage.add_argument("file", type=Path, help="a file of config/theory")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--output", type=Path, required=True)

    stage = add("theory-report", _theory_report, "Write a theory study's table and figure.")
    stage.add_argument("file", type=Path, help="output of the stage theory")
    stage.add_argument("--output-prefix", type=Path, required=True, help="of the table's files")
    stage.add_argument("--figure", type=Path, required=True, help="figure to write (png)")

    stage = add("provenance", _provenance, "Record what made the results.")
    stage.add_argument("--config-hash", required=True)
    stage.add_argument("--benchmarks", type=Path, required=True, help="folder of the workflow's benchmarks")
    stage.add_argument("--output", type=Path, required=True)
    stage.add_argument("--earlier", type=Path, help="provenance of an earlier run whose results are kept")

    stage = add("page", _page, "Write a table, the comparison or the provenance as an HTML page.")
    stage.add_argument("source", type=Path, help="a table's .md, comparison.csv, or provenance.json")
    stage.add_argument("--title", default="", help="of a table's page")
    stage.add_argument("--output", type=Path, required=True, help="HTML file to write")

    stage = add("overview", _overview, "Write the pages of the comparison, the costs and the provenance.")
    stage.add_argument("source", type=Path, nargs="+", help="comparison.csv, costs.md, provenance.json")
    stage.add_argument("--output-folder", type=Path, required=True, help="for pages of the same names")

    stage = add("config-reference", _config_reference, "Write the reference of all configuration keys.")
    stage.add_argument("--output", type=Path, required=True, help="file to write (Markdown)")

    if not given or given[0] not in stages.choices:
        for name, domains in _stages().items():
            stage = add(name, _run_stage, f"A stage of experiments of {domains}.")
            stage.add_argument("config", type=Path, nargs="+", help=_CONFIG)
            stage.add_argument("--method", default="", help="name of one of the experiment's methods")
            stage.add_argument("--seed", type=int, help="seed of the run")
            stage.add_argument("--results", type=Path, required=True, help="folder of all results")
            stage.add_argument("--workers", type=int, help="processes beside its own")
            stage.add_argument("--gpu", type=int, default=0, help="GPUs that the job was given")
    return parser


_CONFIG = "experiments' files, resolved or as written"


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


def _check(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.domain import domain_of, imported
    from flowtilt.pipeline.experiment import load_resolved

    for file in a.config:
        experiment = load_resolved(file)
        if verify := domain_of(experiment).verify:
            imported(verify)(experiment)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    from flowtilt.pipeline.configuration import no_repeats

    no_repeats([f"key {key}" for key, _ in pairs])
    return dict(pairs)


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON mapping")
    return value


def _doctor(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.doctor import examine

    partition = os.environ.get("SBATCH_PARTITION", "") if a.partition is None else a.partition
    for line in examine(a.configfile, partition, a.gpu):
        print(line)


def _resolve(a: argparse.Namespace) -> None:
    from flowtilt.files import write_text
    from flowtilt.pipeline.configuration import ConfigError
    from flowtilt.pipeline.experiment import dump, load_file

    experiments = load_file(a.file, a.override)
    name = a.name or (next(iter(experiments)) if len(experiments) == 1 else None)
    if name not in experiments:
        raise ConfigError(f"{a.file}: --name must be one of {', '.join(experiments)}")
    write_text(a.output, dump(experiments[name]))


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


def _table(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.tables import write_table

    write_table(a.file, a.override, a.results, a.reported, a.output_prefix)


def _figures(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.figures import write_figures

    write_figures(a.file, a.override, a.results, a.reported, a.output_prefix)


def _compare(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.tables import write_comparison

    write_comparison(a.files, a.override, a.results, a.reported, a.output, a.by_seed, a.earlier)


def _costs(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.costs import write_costs

    write_costs(a.files, a.override, a.benchmarks, a.output_prefix, a.earlier)


def _theory(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.theory import stage as theory

    for violation in theory.run(a.file, a.override, a.output):
        log.warning("a bound is violated: %s", violation)


def _theory_report(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.theory import stage as theory

    theory.report(a.file, a.output_prefix, a.figure)


def _provenance(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.provenance import write_provenance

    write_provenance(a.config_hash, a.benchmarks, a.output, a.earlier)


def _page(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.pages import write_page

    write_page(a.source, a.title or a.source.stem, a.output)


def _overview(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.report.pages import write_page

    for source in a.source:
        write_page(source, source.stem.capitalize(), a.output_folder / f"{source.stem}.html")


def _config_reference(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.config_reference import write_reference

    write_reference(a.output)


if __name__ == "__main__":
    sys.exit(run())
