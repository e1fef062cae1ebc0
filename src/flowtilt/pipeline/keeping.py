"""The stage of methods that train nothing: it keeps samples of the pretrained model, and says what they cost.

See :mod:`flowtilt.untrained`. Randomness follows from the names of experiment, method and seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowtilt.devices import generator_of
from flowtilt.functionals.base import FirstVariation
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.model import Context
from flowtilt.pipeline.domain import Job
from flowtilt.pipeline.files import Metrics, StageError, read_arrays, write_json
from flowtilt.pipeline.health import warn
from flowtilt.pipeline.stages import Workbench, fixed_tilt_of, workbench_of
from flowtilt.rewards import Reward
from flowtilt.sampling import CHUNK
from flowtilt.tilts import Groups
from flowtilt.untrained import Kept, SteeringSettings, best_of, resample, steer


def keep(job: Job) -> None:
    """Keep as many samples of the pretrained model as a run is measured by, with contexts as it has them.

    Raises:
        StageError: if no sample has a reward.
    """
    bench = workbench_of(job)
    random = generator_of(job.experiment.name, job.method, "keep", job.seed)
    count, context = bench.contexts(random)
    kept = _BY_KIND[job.run.kind](bench, count, context, random)
    bench.close()
    if bool(kept.rewards.isnan().all()):
        raise StageError(
            f"experiment {job.experiment.name}: method {job.method!r}, seed {job.seed}: no sample of the "
            "pretrained model has a reward; look at the model"
        )
    row: Metrics = {
        "sample_passes": float(kept.network_passes),
        "sample_rewards": float(kept.reward_calls),
        "plain_passes": float(job.experiment.sample_passes),
        "kl": kept.kl,
    }
    if job.run.kind != "best_of":
        row["effective_sample_size"] = kept.effective_share * kept.drawn * count
        row["distinct_share"] = kept.distinct_share
    warn(job.method, row)
    bench.write(kept.samples, kept.context, job.outputs["samples"])
    write_json(row, job.outputs["kept"])


def _best_of(bench: Workbench, count: int, context: Context, random: torch.Generator) -> Kept:
    """The best of every few fresh samples, by the reward."""
    n, passes = bench.experiment.methods[bench.job.method].n, bench.experiment.sample_passes
    chunk = bench.chunk or CHUNK
    return best_of(bench.flow, bench.reward, n, count, bench.draw, passes, random, context, chunk)


def _resampled(bench: Workbench, count: int, context: Context, random: torch.Generator) -> Kept:
    """The offline batch under the tilt, within each context; it has those that the samples should have.

    A context of which the batch has no sample with a reward leaves its share to the others.
    """
    batch, flow, experiment = bench.job.read("offline"), bench.flow, bench.experiment
    x, rewards, contexts = read_arrays(batch, "x", "reward", "context")
    wanted = flow.context_labels(context)
    asked = np.zeros(count, dtype=np.int64) if wanted is None else wanted.numpy(force=True)
    known = np.flatnonzero(~np.isnan(rewards) & np.isin(contexts, asked))
    if not known.size:
        raise StageError(f"{batch}: no sample of the batch has a reward; look at the pretrained model")
    # Groups and these numbers are both in the order of the contexts' own.
    number = np.unique(asked[np.isin(asked, contexts[known])], return_counts=True)[1]
    groups = replace(Groups.of(contexts, known), shares=number / number.sum())
    tilt, kl_weight = _tilt(bench)
    found = resample(tilt.of(rewards[known].astype(np.float64)) / kl_weight, groups, count, random)
    chosen, size = known[found.index], len(rewards)
    return Kept(
        torch.as_tensor(x[chosen]),
        flow.context_of(torch.as_tensor(contexts[chosen])),
        torch.as_tensor(rewards[chosen]),
        len(known) / count,
        experiment.offline_passes / count,
        size / count,
        found.kl,
        found.effective_share,
        found.distinct_share,
    )


def _steered(bench: Workbench, count: int, context: Context, random: torch.Generator) -> Kept:
    """Particles of sequential Monte Carlo along the memoryless process."""
    method = bench.experiment.methods[bench.job.method]
    given = {key: getattr(method, key) for key in ("particles", "every", "share")}
    settings = SteeringSettings(
        steps=bench.experiment.solver.steps,
        **{key: value for key, value in given.items() if value is not None},
    )
    tilt, kl_weight = _tilt(bench)
    chunk = bench.chunk or CHUNK
    return steer(bench.flow, _Tilt(tilt), kl_weight, count, settings, random, context, chunk)


_BY_KIND: dict[str, Callable[[Workbench, int, Context, torch.Generator], Kept]] = {
    "best_of": _best_of,
    "resampled": _resampled,
    "steered": _steered,
}


def _tilt(bench: Workbench) -> tuple[RewardVariation | Hinge, float]:
    of = bench.experiment.tilted_like(bench.job.method)
    return fixed_tilt_of(bench, of, bench.job.read_if_any("threshold"))


class _Tilt(Reward):
    """What is tilted by, as a reward."""

    may_fail = True

    def __init__(self, variation: FirstVariation) -> None:
        self.variation = variation

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        return self.variation.value(x, context)
