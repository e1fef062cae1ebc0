"""The jobs of experiments on images, by stage; their files are those of the domain's stages."""

from __future__ import annotations

from flowtilt.pipeline.domain import Job


def fetch(job: Job) -> None:
    from flowtilt.domains.images.fetching import fetch

    fetch(job.experiment, job.outputs["fetched"])


def train_pipeline(job: Job) -> None:
    from flowtilt.domains.images import models

    updates = models.updates_of(job.experiment, "pipeline")
    progress = job.bar(updates, f"{job.experiment.model.name} pipeline")
    models.train_pipeline(job.experiment, job.outputs["pipeline"], progress)


def train_alignment(job: Job) -> None:
    from flowtilt.domains.images import models

    updates = models.updates_of(job.experiment, "alignment")
    progress = job.bar(updates, f"{job.experiment.model.name} alignment")
    models.train_alignment(job.experiment, job.outputs["alignment"], progress)


def write_model(job: Job) -> None:
    from flowtilt.domains.images.models import write_model

    parts = (job.read_if_any("pipeline"), job.read_if_any("alignment"))
    write_model(job.experiment, job.outputs["model"], *parts)


def sample(job: Job) -> None:
    from flowtilt.domains.images.sampling import sample

    pretrained, weights = job.read("pretrained"), job.read_if_any("model")
    sample(job.experiment, job.method, job.seed, pretrained, job.outputs["images"], weights)


def evaluate(job: Job) -> None:
    from flowtilt.domains.images.evaluation import evaluate

    files = (job.read("pretrained"), job.read("images"), job.outputs["metrics"], job.outputs["scores"])
    trained = (job.read_if_any("history"), job.read_if_any("threshold"))
    evaluate(job.experiment, job.method, *files, *trained)
