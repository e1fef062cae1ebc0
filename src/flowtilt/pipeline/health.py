"""Whether a fine-tuning has tested its method: what was active, what its weights rest on, what came of it.

A hinge whose threshold no sample reaches has no gradient, a bank on a handful of samples is noise, and a
tilt that its model does not follow is another one. None of this shows in a tail mean. So every run has the
metrics of this module, every table a panel of them, and what passes a bound is flagged there and said in the
job's log. This module stays clear of torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flowtilt.metrics.tails import hinge
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import Metrics, read_arrays, read_columns, read_kept, read_threshold
from flowtilt.tilts import LEAST, Groups, tilted

logger = logging.getLogger(__name__)

MOST_INACTIVE = 0.5
"""Share of a run's updates without any active sample above which it is flagged.

The share of active *samples* has no bound of its own: on a tail of one per cent it is about that by
construction, and falls to none as a lower tail is mended.
"""

LEAST_ESS = 10.0
"""Effective samples of a bank below which a run is flagged, and no tilt is predicted from samples."""

LEAST_REALISED = 0.5
"""Share of the predicted rise of the tilt's mean below which a run is flagged."""

LEAST_DISTINCT = 0.5
"""Share of distinct samples, of those that a method has kept, below which a run is flagged."""

TOLD = 4.0
"""Standard errors that a predicted rise must have, to be told from the samples' noise."""

HEALTH = (
    *("threshold", "offline_active_share", "active_share", "active_share_final", "inactive_updates"),
    *("effective_sample_size", "kl_paid", "clipped_share", "tilt_predicted", "tilt_realised"),
)
"""The metrics of a fine-tuning that every domain has, in the order of their panel."""

KEEPING = (
    *("sample_passes", "plain_passes", "sample_rewards", "kl"),
    *("effective_sample_size", "distinct_share"),
)
"""The metrics of a method that trains nothing, which every domain has, in the order of their panel."""

KEEPING_NOTE = (
    "Kept samples, of methods that train nothing: what each sample costs whenever one is wanted, where a "
    "fine-tuned model draws at the price of a plain sample. The offline batch is shared out over the samples "
    "that were kept of it. The KL divergence from the pretrained distribution is log n - (n - 1) / n for the "
    "best of n, that of the bank's weights for resampling, and E[f] / alpha - log Z for steering by f. "
    "Effective samples are of the bank, or of all particles and resamplings together. Flags: few, fewer than "
    f"{LEAST_ESS:g} effective samples; copies, less than {100 * LEAST_DISTINCT:g} % of the samples are "
    "distinct, and measures of diversity and tails are those of fewer samples."
)
"""What that panel and its flags are."""

NOTE = (
    "Fine-tuning: active samples are those on which what is tilted by has a gradient; effective samples are "
    "the fewest of a bank's weights; KL paid is summed over solves, along paths for Adjoint Matching and of "
    "the weights for fits. The predicted tilt is the rise of the mean of what am and tfft tilt by, by exact "
    "weights of the pretrained model's evaluated samples, within each context; n/a where fewer than "
    f"{LEAST_ESS:g} effective ones carry it, or their noise hides it. Flags: idle, no sample was active, and "
    f"the run has not tested its method; scarce, more than {100 * MOST_INACTIVE:g} % of the updates had no "
    f"active sample; few, fewer than {LEAST_ESS:g} effective samples; short, less than "
    f"{100 * LEAST_REALISED:g} % of the predicted tilt was realised."
)
"""What the panel and its flags are."""


def flags(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """What passes a bound, by the word of its flag, in a sentence for the log."""

    def value(name: str) -> float:
        found = metrics.get(name)
        return math.nan if found is None else found

    active, inactive, samples = map(value, ("active_share", "inactive_updates", "effective_sample_size"))
    predicted, realised = value("tilt_predicted"), value("tilt_realised")
    found = {}
    if active == 0:
        found["idle"] = "no sample was active in any update: the run has not tested its method"
    elif inactive > MOST_INACTIVE:
        found["scarce"] = f"{100 * inactive:.3g} % of its updates had no active sample"
    if samples < LEAST_ESS:
        found["few"] = f"its weights rest on {samples:.3g} effective samples"
    if value("distinct_share") < LEAST_DISTINCT:
        found["copies"] = f"{100 * value('distinct_share'):.3g} % of the samples that it keeps are distinct"
    if realised < LEAST_REALISED * predicted:
        found["short"] = f"the mean of its tilt rose by {realised:.4g}, where {predicted:.4g} was predicted"
    return found


def warn(method: str, metrics: Mapping[str, float | None]) -> None:
    """One line of the log for each bound that a run passes."""
    for word, sentence in flags(metrics).items():
        logger.warning("%s (%s): %s", method, word, sentence)


def training_metrics(history: Mapping[str, np.ndarray]) -> Metrics:
    """What a history says, by its columns, each (updates,).

    ``active_share`` is the mean over all updates, ``active_share_final`` and ``clipped_share`` over the last
    fifth, and ``inactive_updates`` the share of updates without an active sample. ``effective_sample_size``
    is the smallest of any bank. ``kl_paid`` sums what solves pay, in nats: of Adjoint Matching the path-space
    divergence over the last fifth of a solve's updates, of fits that of the weights.
    """
    active = history["active_share"]
    last = _last_fifth(len(active))
    row: Metrics = {
        "active_share": float(active.mean()),
        "active_share_final": float(active[last].mean()),
        "inactive_updates": float((active == 0).mean()),
    }
    if (samples := history.get("effective_sample_size")) is not None:
        row["effective_sample_size"] = float(samples.min())
    solves = history.get("iteration", np.zeros(len(active)))
    if (nats := history.get("path_kl", history.get("kl"))) is not None:
        each = [nats[solves == solve] for solve in np.unique(solves)]
        row["kl_paid"] = float(sum(one[_last_fifth(len(one))].mean() for one in each))
    if (clipped := history.get("clipped_share")) is not None:
        row["clipped_share"] = float(clipped[last].mean())
    return row


def _last_fifth(updates: int) -> slice:
    return slice(-max(1, updates // 5), None)


def tuned_metrics(job: Job) -> Metrics:
    """What the history and the threshold of a run say, or what the samples that it has kept cost, those among
    a job's inputs."""
    row: Metrics = {}
    if (history := job.read_if_any("history")) is not None:
        row |= training_metrics(read_columns(history, "active_share"))
    if (threshold := job.read_if_any("threshold")) is not None:
        row |= read_threshold(threshold)
    if (kept := job.read_if_any("kept")) is not None:
        row |= read_kept(kept)
    return row


def tilt_metrics(job: Job, rewards: np.ndarray, reference: Path | None, contexts: str = "") -> Metrics:
    """The predicted and the realised rise of the mean of what a method of kind am or tfft tilts by.

    Both are over the pretrained model's samples as they are evaluated, so that neither has a sampler's
    error. What is short is said in the log.

    Args:
        job: of a run that is evaluated.
        rewards: of its samples, NaN where one failed, (n,).
        reference: file with the pretrained model's ``reward``; without it, or not there, there are none.
        contexts: name of the array in that file with the number of each sample's context, if they differ.

    Raises:
        StageError: if the file is not whole.
    """
    if reference is None or not reference.is_file():
        return {}
    before, *labels = read_arrays(reference, "reward", *([contexts] if contexts else []))
    known = np.flatnonzero(~np.isnan(before))
    values, scale = _tilt_of(job, before[known])
    reached, _ = _tilt_of(job, rewards[~np.isnan(rewards)])
    if not known.size or not reached.size:
        return {}
    groups = Groups.of(labels[0].astype(np.int64) if labels else None, known, LEAST)
    under = tilted(values / scale, groups)
    predicted = under.mean(values) - float(groups.probabilities @ values)
    error = math.hypot(values.std() / math.sqrt(len(values)), reached.std() / math.sqrt(len(reached)))
    told = under.effective_share * len(values) >= LEAST_ESS and predicted > TOLD * error
    row: Metrics = {
        "tilt_predicted": predicted if told else None,
        "tilt_realised": float(reached.mean() - values.mean()),
    }
    warn(job.method, row)
    return row


def _tilt_of(job: Job, rewards: np.ndarray) -> tuple[np.ndarray, float]:
    """What the job's method tilts by, as a function of rewards, and its KL weight."""
    experiment, method, r = job.experiment, job.method, rewards.astype(np.float64)
    own = _within_budget(job)
    if job.run.kind == "am":
        return r, own["kl_weight"] if own else experiment.reward_weight_of(method)
    problem = experiment.tail_of(method)
    if own:
        at, weight = own["parameter"], own["kl_weight"]
        return hinge(r, at, problem.mass, problem.tail), weight
    at = read_threshold(job.read("threshold"))["threshold"]
    return hinge(r, at, problem.mass, problem.tail), problem.alpha


def _within_budget(job: Job) -> dict[str, float]:
    """The problem that a chain with a budget has ended at; empty for a run without one."""
    if job.experiment.solver_of(job.method).kl is None:
        return {}
    history = read_columns(job.read("history"), "kl_weight", "parameter")
    return {name: float(history[name][-1]) for name in ("kl_weight", "parameter")}
