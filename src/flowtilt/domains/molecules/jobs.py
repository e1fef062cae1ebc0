"""The jobs of experiments on molecules, by stage; their files are those of the domain's stages."""

from __future__ import annotations

from flowtilt.pipeline.domain import Job


def prepare(job: Job) -> None:
    """Parse QM9 from the installed package."""
    from flowtilt.domains.molecules import data

    data.prepare(job.outputs["molecules"])


def pretrain(job: Job) -> None:
    from flowtilt.domains.molecules.pretraining import pretrain

    config = job.experiment
    progress = job.bar(config.pretrain.updates, "pretrain") if config.checkpoint.retrain else None
    pretrain(config, job.read("molecules"), job.outputs["model"], job.outputs["record"], progress)


def sample(job: Job) -> None:
    from flowtilt.domains.molecules.sampling import sample

    model, molecules = job.read_if_any("model"), job.read_if_any("molecules")
    sample(job.experiment, job.method, job.seed, job.outputs["samples"], model, molecules)


def evaluate(job: Job) -> None:
    from flowtilt.domains.molecules.evaluation import evaluate

    read = (job.read("samples"), job.read("molecules"))
    written = (job.outputs["metrics"], job.outputs["sdf"], job.outputs["energies"])
    trained = (job.read_if_any("history"), job.read_if_any("threshold"))
    evaluate(job.experiment, job.method, *read, *written, *trained, job.workers)
