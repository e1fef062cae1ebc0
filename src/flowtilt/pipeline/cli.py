"""The command line: one subcommand per pipeline stage, nothing else.

Heavy imports wait until a stage is chosen, so that ``--help`` and the light stages start fast.
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
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from flowtilt.domains.images import cli as cli_images
from flowtilt.domains.molecules import cli as cli_molecules
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
    arguments = _parser().parse_args(argv)
    gc.disable()  # importing torch makes a million objects that stay
    try:
        _start_logging(arguments.log)
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


def _start_logging(file: Path | None) -> None:
    """Messages go to standard error, and with tracebacks to the log file."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, mode="w", encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowtilt", description="Fine-tune flow models beyond the average reward, one stage at a time."
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def add(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        stage = stages.add_parser(name, help=text, description=text)
        stage.add_argument("--log", type=Path, help="also write messages, with tracebacks, to this file")
        stage.set_defaults(handler=handler)
        return stage

    def on_config(name: str, handler: Handler, text: str, *options: str) -> argparse.ArgumentParser:
        stage = add(name, handler, text)
        stage.add_argument("config", type=Path, help="an experiment's file, resolved or as written")
        for option in options:
            kind: Any = {"--seed": int, "--method": str}.get(option, Path)
            stage.add_argument(option, type=kind, required=True, help=_HELP[option])
        return stage

    stage = add("doctor", _doctor, "Say what this machine, or the cluster it submits to, can run of a plan.")
    stage.add_argument(
        "--configfile", type=Path, nargs="+", default=[], help="as for Snakemake: over config/config.yaml"
    )
    stage.add_argument("--partition", default=None, help="of SLURM (default: $SBATCH_PARTITION)")
    stage.add_argument("--gpu", type=int, default=None, help="GPUs of a job, over the configuration's")

    stage = add("check", _check, "Refuse functionals that no job of some experiments could use.")
    stage.add_argument("config", type=Path, nargs="+", help="resolved files of experiments on functionals")

    stage = add("resolve", _resolve, "Validate a file and write one of its experiments, overrides merged in.")
    stage.add_argument("file", type=Path, help="a file of config/experiments")
    stage.add_argument("--name", help="the experiment or case; may be left out for an ordinary file")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--output", type=Path, required=True)

    stage = add("calibrate", _calibrate, "Print where the pretrained row puts the landscape's right edge.")
    stage.add_argument("config", type=Path, help="an experiment's file")

    on_config("pretrain", _pretrain, "Pretrain the network.", "--seed", "--output", "--history")
    on_config("density", _density, "Grid a pretrained model's log-density.", "--model", "--output")
    on_config("offline", _offline, "Draw the offline batch.", "--seed", "--model", "--output")
    on_config("threshold", _threshold, "Solve TFFT's dual.", "--method", "--offline", "--output")

    stage = on_config(
        "finetune",
        _finetune,
        "Fine-tune by am, fdc or tfft.",
        *("--method", "--seed", "--pretrained", "--output", "--history"),
    )
    stage.add_argument("--start", type=Path, help="weights of the fdc run to continue")
    stage.add_argument("--threshold", type=Path, help="tfft's threshold file")

    on_config("sample", _sample, "Sample a run's model.", "--method", "--seed", "--model", "--output")

    stage = on_config(
        "evaluate", _evaluate, "Metrics of a run.", "--method", "--samples", "--density", "--output"
    )
    stage.add_argument("--history", type=Path, help="the fine-tuning's history")
    stage.add_argument("--threshold", type=Path, help="tfft's threshold file")
    stage.add_argument("--reference", type=Path, help="samples of the pretrained model, for dominance")

    cli_molecules.add_stages(add)
    cli_images.add_stages(add)

    stage = add(
        "measure", _measure, "Sample and measure all runs of a seed, and solve problems on functionals."
    )
    stage.add_argument("config", type=Path, nargs="+", help="experiments' files, resolved")
    stage.add_argument("--seed", type=int, required=True, help=_HELP["--seed"])
    stage.add_argument("--results", type=Path, required=True, help="results folder with the trained models")

    stage = on_config("exact", _exact, "Solve every method on the grid.", "--density", "--output", "--laws")
    stage.add_argument("--resolution", type=Path, help="resolution file: solve at that resolution as well")
    stage.add_argument("--resolved-output", type=Path, help="file for the metrics at that resolution")
    stage.add_argument("--resolved-laws", type=Path, help="file for the laws at that resolution (npz)")

    stage = add("resolution", _resolution, "Measure the width that the network resolves.")
    for option in ("--config", "--samples", "--density"):
        stage.add_argument(option, type=Path, nargs="+", required=True, help="one a run, in the same order")
    stage.add_argument("--output", type=Path, required=True)

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

    stage = add("theory", _theory, "Check the papers' guarantees on laws that are known exactly.")
    stage.add_argument("file", type=Path, help="a file of config/theory")
    stage.add_argument("--override", type=_mapping, default={}, help="JSON mapping, merged in last")
    stage.add_argument("--output", type=Path, required=True)

    stage = add("theory-report", _theory_report, "Write a theory study's table and figure.")
    stage.add_argument("file", type=Path, help="output of the stage theory")
    stage.add_argument("--output-prefix", type=Path, required=True, help="of the table's files")
    stage.add_argument("--figure", type=Path, required=True, help="picture to write (png)")

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
    return parser


_HELP = {
    "--seed": "seed of the run",
    "--method": "name of one of the experiment's methods",
    "--model": "weights to read (safetensors)",
    "--pretrained": "weights of the pretrained model (safetensors)",
    "--offline": "the offline batch (npz)",
    "--samples": "the run's samples (npz)",
    "--density": "gridded log-density of the pretrained model (npz)",
    "--output": "file to write",
    "--history": "history to write (csv), a row an update",
    "--laws": "file for the solved laws (npz)",
}


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


def _check(a: argparse.Namespace) -> None:
    from flowtilt.domains.planar.checking import check_experiment
    from flowtilt.pipeline.experiment import load_resolved

    for file in a.config:
        check_experiment(load_resolved(file))


def _resolve(a: argparse.Namespace) -> None:
    from flowtilt.files import write_text
    from flowtilt.pipeline.configuration import ConfigError
    from flowtilt.pipeline.experiment import dump, load_file

    experiments = load_file(a.file, a.override)
    name = a.name or (next(iter(experiments)) if len(experiments) == 1 else None)
    if name not in experiments:
        raise ConfigError(f"{a.file}: --name must be one of {', '.join(experiments)}")
    write_text(a.output, dump(experiments[name]))


def _calibrate(a: argparse.Namespace) -> None:
    from flowtilt.domains.planar.calibration import calibrated_edge
    from flowtilt.pipeline.experiment import load_resolved, tail_experiment

    print(f"right_edge: {calibrated_edge(tail_experiment(load_resolved(a.config))):.5f}")


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


def _training() -> Any:
    """The stages that train and sample networks."""
    from flowtilt.domains.planar import training

    prepare_torch(gpu=True)
    return training


class Bar:
    """A progress bar over updates that shows the loss."""

    def __init__(self, total: int, label: str) -> None:
        from tqdm import tqdm

        from flowtilt.parallel import processes

        disable = None if processes().leads else True
        self._bar = tqdm(total=total, desc=label, unit="update", mininterval=1.0, disable=disable)

    def __call__(self, row: dict[str, float]) -> None:
        self._bar.set_postfix(loss=f"{row['loss']:.3g}", refresh=False)
        self._bar.update()


def _load(a: argparse.Namespace) -> Any:
    from flowtilt.pipeline.experiment import load_resolved, planar_experiment

    return planar_experiment(load_resolved(a.config))


def _pretrain(a: argparse.Namespace) -> None:
    experiment = _load(a)
    bar = Bar(experiment.pretrain.updates, "pretrain")
    _training().pretrain(experiment, a.seed, a.output, a.history, bar)


def _density(a: argparse.Namespace) -> None:
    prepare_torch()
    from flowtilt.domains.planar import solving as truth

    truth.density(_load(a), a.model, a.output)


def _offline(a: argparse.Namespace) -> None:
    _training().offline(_load(a), a.seed, a.model, a.output)


def _threshold(a: argparse.Namespace) -> None:
    from flowtilt.domains.planar import evaluation

    evaluation.threshold(_load(a), a.method, a.offline, a.output)


def _finetune(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.experiment import method_of

    experiment = _load(a)
    iterations = method_of(experiment, a.method).iterations or 1
    bar = Bar(experiment.updates_of(a.method) * iterations, f"{experiment.name} {a.method}")
    _training().finetune(
        experiment, a.method, a.seed, a.pretrained, a.output, a.history, a.start, a.threshold, bar
    )


def _sample(a: argparse.Namespace) -> None:
    _training().sample(_load(a), a.method, a.seed, a.model, a.output)


def _evaluate(a: argparse.Namespace) -> None:
    from flowtilt.domains.planar import evaluation

    evaluation.evaluate(
        _load(a), a.method, a.samples, a.density, a.output, a.history, a.threshold, a.reference
    )


def _measure(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.experiment import load_resolved, planar_experiment

    prepare_torch()
    from flowtilt.domains.planar import measuring

    experiments = [planar_experiment(load_resolved(file)) for file in a.config]
    measuring.measure(experiments, a.seed, a.results)


def _exact(a: argparse.Namespace) -> None:
    from flowtilt.domains.planar import solving as truth

    resolved = (a.resolution, a.resolved_output, a.resolved_laws)
    if any(resolved) and not all(resolved):
        raise ValueError("--resolution, --resolved-output and --resolved-laws go together: give all or none")
    layers = [truth.Layer(a.output, a.laws)]
    if a.resolution:
        layers.append(truth.Layer(a.resolved_output, a.resolved_laws, a.resolution))
    truth.exact(_load(a), a.density, *layers)


def _resolution(a: argparse.Namespace) -> None:
    from flowtilt.pipeline.experiment import load_resolved, planar_experiment

    if not len(a.config) == len(a.samples) == len(a.density):
        raise ValueError("--config, --samples and --density must name one file a run each")
    experiments = (planar_experiment(load_resolved(file)) for file in a.config)
    runs = zip(experiments, a.samples, a.density, strict=True)
    from flowtilt.domains.planar import solving as truth

    truth.measure_resolution(runs, a.output)


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
