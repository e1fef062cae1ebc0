"""What is shown of experiments on images: metrics, what holds of what should, and what papers report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from flowtilt.domains.images.experiment import ImageExperiment, tail_metric
from flowtilt.pipeline.report.base import Shown, Table
from flowtilt.pipeline.report.claims import decided, gains, more_than, no_less_than, spread
from flowtilt.pipeline.report.measurements import of_row
from flowtilt.pipeline.report.panels import describe, pretty
from flowtilt.pipeline.report.tables import experiment_table

_NOTE = (
    "Rows: each method's model; pretrained is not fine-tuned. Models of one seed start from the same noise. "
    "Vendi score: the effective number of different images, by the cosine similarities of their features. "
    "CLIP score: mean cosine similarity of an image and its prompt. The features are those of the model "
    "that scores images, which also tells designs apart: one is covered if any image is of it, and their "
    "effective number is the exponential of the entropy of their shares. Tail means are over the rewards of "
    "all images of all prompts."
)
_CLIP_REWARD = "The reward is the CLIP score."
_SMALL = (
    "The model is a small one on drawn images, and so is the CLIP that scores them; the papers have Stable "
    "Diffusion, a large CLIP and, for the left tail, ImageReward. Scores are on other scales, and only "
    "directions can be compared."
)


def table(shown: Shown) -> Table:
    """The table of an experiment, whose text says what holds of what should; there are no studies."""
    experiment = shown.experiments[0]
    said = partial(findings, experiment=experiment, values=shown.reported)
    return experiment_table(shown, partial(groups, experiment), said, note(experiment))


def draw(shown: Shown, prefix: str) -> None:
    """Figures of an experiment."""
    from flowtilt.domains.images import figures

    figures.draw(shown, prefix)


def note(experiment: ImageExperiment) -> str:
    """What the rows and the metrics of an experiment's table are."""
    parts, asked = [_NOTE], experiment.evaluation
    if asked.factors:
        parts.append("Combinations are those of the design and of other factors that it tells apart as well.")
    if asked.sets > 1:
        parts.append(
            f"Vendi scores, numbers covered and effective numbers are means over {asked.sets} sets of "
            f"{asked.images} images of a prompt; all else is of all images."
        )
    if experiment.reward.kind == "clip":
        parts.append(_CLIP_REWARD)
    if experiment.model.embedded is not None:
        parts.append(_SMALL)
    return " ".join(parts)


def groups(experiment: ImageExperiment, caption: str) -> dict[str, list[str]]:
    """The metrics of each table of an experiment, by the table's caption."""
    diversity = ["vendi", *(["vendi_of_a_prompt"] if len(experiment.prompts) > 1 else [])]
    if experiment.evaluation.designs:
        diversity += ["designs_covered", "effective_designs"]
    if experiment.evaluation.factors:
        diversity.append("combinations_covered")
    # A reward that is the CLIP score itself would be there twice.
    doubled = experiment.reward.kind == "clip"
    if experiment.objective.utility == "entropy":
        led_by = ["vendi", "clip", *([] if doubled else [experiment.mean_metric])]
    else:
        led_by = [experiment.main_metric, experiment.mean_metric]
        led_by += map(tail_metric, sorted(experiment.tail_masses))
        led_by += [] if doubled else ["clip"]
    return {
        caption: list(dict.fromkeys([*led_by, *diversity])),
        "Shares of the designs": [f"share_{name}" for name in experiment.evaluation.designs],
    }


_REPORTED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "entropy": ("text_to_image_sd14", {}),
    "left_tail": ("text_to_image_sd15", {"image_reward_mean": "mean_reward"}),
}
"""By utility, the experiment of the papers, and what its metrics are called here."""


def reported(values: pd.DataFrame, experiment: ImageExperiment) -> pd.DataFrame:
    """The reported values, and once more those that belong beside an experiment, under its own names.

    Returns:
        The lines of ``values``, and those of the papers' experiment with the experiment's name and its
        names of metrics.
    """
    papers, names = _REPORTED[experiment.objective.utility]
    own = values[values["experiment"] == papers]
    own = own.assign(experiment=experiment.name, metric=own["metric"].replace(dict(names)))
    return pd.concat([values, own], ignore_index=True)


def findings(long: pd.DataFrame, experiment: ImageExperiment, values: pd.DataFrame) -> list[str]:
    """Sentences on what the methods should do, by differences of paired seeds, and on reported costs."""
    kinds = ("pretrained", "am", "fdc", "tfft")
    of = {kind: [n for n, c in experiment.methods.items() if c.kind == kind] for kind in kinds}
    mean = experiment.mean_metric
    said = [more_than(long, am, base, mean) for am in of["am"] for base in of["pretrained"]]
    explores = experiment.objective.utility == "entropy"
    if explores:
        for method in of["fdc"]:
            for base in of["pretrained"]:
                said += _explores(long, experiment, method, base)
        said += _rises_with_falling_alpha(long, experiment, of["fdc"])
    for method in [] if explores else [*of["tfft"], *of["fdc"]]:
        others = [*of["pretrained"], *of["am"]]
        said += [more_than(long, method, other, tail_metric(experiment.mass_of(method))) for other in others]
        said += [more_than(long, method, base, mean) for base in of["pretrained"]]
        said += [_beside(long, method, am, mean) for am in of["am"]]
        if method in of["tfft"]:
            said.append(_is_active(long, method))
    return [*said, *_days(experiment, values)]


def _explores(long: pd.DataFrame, experiment: ImageExperiment, method: str, base: str) -> list[str]:
    """More diverse images that still are of the prompt."""
    said = [more_than(long, method, base, "vendi")]
    if experiment.evaluation.designs:
        said.append(_covers_more(long, experiment, method, base))
        said.append(more_than(long, method, base, "effective_designs"))
    if experiment.evaluation.factors:
        said.append(more_than(long, method, base, "combinations_covered"))
    return [*said, no_less_than(long, method, base, "clip")]


def _covers_more(long: pd.DataFrame, experiment: ImageExperiment, method: str, base: str) -> str:
    """More of the designs; or, where there are no more, how many."""
    every = len(experiment.evaluation.designs)
    if (of_row(long, base, "designs_covered") < every).any():
        return more_than(long, method, base, "designs_covered")
    return (
        f"{method} cannot cover more designs than {base}, which covers all {every} on every seed: it covers "
        f"{spread(of_row(long, method, 'designs_covered'))}."
    )


def _rises_with_falling_alpha(
    long: pd.DataFrame, experiment: ImageExperiment, methods: list[str]
) -> list[str]:
    """Whether the Vendi score of methods that differ in their KL weight rises as it falls."""
    weights = {experiment.entropy_weight(method): method for method in reversed(methods)}
    ordered = [weights[alpha] for alpha in sorted(weights, reverse=True)]
    if len(ordered) < 2:
        return []
    steps = [gains(long, after, before, "vendi") for before, after in itertools.pairwise(ordered)]
    words = {decided(step) for step in steps}
    word = next((w for w in ("does not hold", "not decided by these seeds") if w in words), "holds")
    rising = np.array(steps).min(axis=0) > 0
    means = ", ".join(f"{method} {pretty(of_row(long, method, 'vendi').mean())}" for method in ordered)
    return [
        f"The Vendi score rises as alpha falls: {word}, with means {means} (every step up on "
        f"{int(rising.sum())} of {len(rising)} seeds)."
    ]


def _beside(long: pd.DataFrame, method: str, other: str, metric: str) -> str:
    """What neither theory nor paper says: on which side of another method a method is."""
    found = gains(long, method, other, metric)
    word = {"holds": "higher", "does not hold": "lower"}.get(decided(found), "not decided by these seeds")
    words = describe(metric)
    return (
        f"The {words.words} of {method} against that of {other}: {word}, the difference is {spread(found)} "
        f"{words.unit} (higher on {int((found > 0).sum())} of {len(found)} seeds)."
    )


def _is_active(long: pd.DataFrame, method: str) -> str:
    """Whether a tail had samples with a gradient: without any, a run has not tested the method."""
    found, offline = (of_row(long, method, metric) for metric in ("active_share", "offline_active_share"))
    word = "holds" if (found > 0).all() else "does not hold"
    return (
        f"{method} is trained on active samples: {word}, a share of {spread(found)} in training and of "
        f"{spread(offline)} offline (above zero on {int((found > 0).sum())} of {len(found)} seeds)."
    )


def _days(experiment: ImageExperiment, values: pd.DataFrame) -> list[str]:
    """What papers report of the training's cost, of the methods that were run."""
    own = values[(values["experiment"] == experiment.name) & (values["metric"] == "training_days")]
    own = own[own["method"].isin(list(experiment.methods))]
    return [
        f"{source} reports {unit} of training, "
        f"{', '.join(f'{value:g} for {m}' for m, value in of[['method', 'value']].to_numpy())}; what ours "
        "took is in the table of costs."
        for (source, unit), of in own.groupby(["source", "unit"], sort=False)
    ]
