"""The studies of the theory as tables: full precision as data, rounded as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flowtilt.pipeline.report.panels import Panel
from flowtilt.pipeline.report.tables import write_panels

Rows = Sequence[Mapping[str, Any]]
SHOWN_ITERATIONS = (1, 2, 5, 10, 20, 50)

_MIRROR_NOTE = (
    "G is a concave utility less alpha times the KL divergence from the pretrained distribution p_0; gaps "
    "are G(p*) - G(p_K). Steps have the KL weight L. Bounds: (L - l)/K KL(p*||p_0), and "
    "l KL(p*||p_0) / ((1 - l/L)^-K - 1) (Lu, Freund and Nesterov 2018). Proven: L and l hold for every "
    "distribution that the run can reach. Measured: L from the largest curvature at distributions between "
    "start and optimum, l from the pairs that the proof uses; both are verified on the run. Observed: "
    "smallest and largest ratio of divergences over random pairs of distributions in the convex hull of the "
    "iterates. The certificate is a duality gap at p*. The rate is fitted to the last half of the gaps above "
    "rounding; a gap falls as the square of a distance, so that (1 - l/L)^2 is what smooth problems come to."
)
_THRESHOLD_NOTE = (
    "Errors are |estimate - exact threshold| over replicate batches. The slope is that of log "
    "root-mean-square error against log batch size over the larger sizes, with its standard error; the last "
    "column is the root mean square of these errors over its limit by the delta method. Effective samples "
    "are those of the exact tilt in the largest batch: far below one, no batch of that size knows the "
    "threshold. Descents run on the right tail's dual; at a kink a fixed step does not settle. Second "
    "differences are divided by the squared step. Shifts: batches from a model at a known KL divergence; "
    "the worst ones attain the sharp bound. No strong-convexity bound is given where it exceeds the range "
    "of the rewards."
)

_TILTS_NOTE = (
    "The model is the exact flow of a mixture of Gaussians with its weights, means and covariances as "
    "parameters: a solver's result is compared with the closed form without drawing a sample. Errors: "
    "of the mean as a share of the way that the tilt moves it, of the covariance relative to its Frobenius "
    "norm, and the largest of a component's weight; of contexts the worst. Effective samples: the fewest of "
    "a bank's weights. Samples are those of banks, or trajectories; the last bank of annealed fitting only "
    "looks at what was reached. A backward pass counts once more to the input, and twice to the parameters. "
    "What the study takes in seconds is in the table of costs."
)


def write_theory_table(result: Mapping[str, Any], prefix: str | Path) -> None:
    """Write ``{prefix}.csv``, ``.md`` and ``.tex`` of a study's result. The data of every panel are in the
    CSV file, one after the other, told apart by the column ``part``."""
    tables: dict[str, Rows] = result["tables"]
    kinds = {
        "mirror_descent": (mirror_panels, _MIRROR_NOTE),
        "threshold": (threshold_panels, _THRESHOLD_NOTE),
        "tilts": (tilt_panels, _TILTS_NOTE),
    }
    panels_of, note = kinds[result["kind"]]
    panels = panels_of(result["title"], tables)
    frame = pd.concat([pd.DataFrame(rows).assign(part=part) for part, rows in tables.items() if rows])
    frame = frame[["part", *(column for column in frame.columns if column != "part")]]
    write_panels(prefix, frame, panels, note)


def number(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits, words as they are, and nothing for None."""
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def mirror_panels(title: str, tables: Mapping[str, Rows]) -> list[Panel]:
    """Constants and rates of every run, then the gaps beside their bounds at some K."""
    lines = [
        [
            run["problem"],
            run["run"],
            *(number(run[key]) for key in ("alpha", "L", "l", "observed_L", "observed_l", "kl")),
            number(run["certificate"], 2),
            _with_error(run["fitted_rate"], run["fitted_rate_error"]),
            *(number(run[key]) for key in ("guaranteed_rate", "squared_rate")),
            f"{run['holds']} of {run['iterations']}",
        ]
        for run in tables["runs"]
    ]
    header = ["problem", "run", "alpha", "L", "l", "observed L", "observed l", "KL(p*||p_0) (nats)"]
    header += ["certificate", "fitted rate", "1 - l/L", "(1 - l/L)^2", "bounds hold at"]
    panels = [Panel(title, header, lines)]
    shown = [row for row in tables["iterations"] if row["K"] in SHOWN_ITERATIONS]
    header = ["problem", "run", "K", "gap", "linear bound", "bound in 1/K", "verdict"]
    lines = [
        [
            row["problem"],
            row["run"],
            str(row["K"]),
            *(number(row[key], 3) for key in ("gap", "linear_bound", "sublinear_bound")),
            row["verdict"],
        ]
        for row in shown
    ]
    return [*panels, Panel("Gaps and bounds at some of the iterations", header, lines)]


def _with_error(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return number(value)
    return f"{value:.4f} ± {error:.2g}"


_HEADERS = {
    "problem": "distribution",
    "threshold": "exact threshold",
    "kind": "optimum",
    "slope_error": "its standard error",
    "over_limit": "error over its limit",
    "size": "batch",
    "replicates": "batches",
    "error_10pct": "10 % quantile",
    "error_median": "median",
    "error_90pct": "90 % quantile",
    "limit_median": "limit of the median",
    "rate": "fitted rate",
    "expected_rate": "1 - step x curvature",
    "where": "dual of the",
    "convex_share": "share convex",
    "concave_share": "share concave",
    "kl": "KL (nats)",
    "pinsker_bound": "Pinsker's bound",
    "strong_convexity_bound": "by strong convexity",
    "verdict": "bounds",
    "kl_weight": "KL weight",
    "mean_error": "error of the mean (%)",
    "covariance_error": "of the covariance (%)",
    "weight_error": "of a weight",
    "samples": "samples drawn",
    "network_passes": "network passes (millions)",
}
"""Headers of the columns that are not called by the words of their keys."""


def threshold_panels(title: str, tables: Mapping[str, Rows]) -> list[Panel]:
    """Errors of batches, descents, convexity and shifts."""
    fits = ("problem", "tail", "alpha", "mass", "threshold", "kind", "effective_samples", "slope")
    errors = ("size", "replicates", "error_10pct", "error_median", "error_90pct", "limit_median")
    rates = ("problem", "descent", "minimum", "updates", "final_error", "rate", "expected_rate")
    signs = ("where", "points", "smallest", "largest", "rounding", "convex_share", "concave_share")
    bounds = ("shift", "sharp_bound", "pinsker_bound", "strong_convexity_bound", "verdict")
    shift = "Shift of the threshold under a batch from another model"
    return [
        _panel(f"{title}: error against batch size", tables["fits"], *fits, "slope_error", "over_limit"),
        _panel("Errors by batch size", tables["errors"], "problem", "tail", *errors),
        _panel("Gradient descent on the right tail's dual", tables["rates"], *rates),
        _panel("Second differences of the duals", tables["convexity"], "problem", "tail", *signs),
        _panel(shift, tables["shift"], "tail", "batch", "delta", "kl", *bounds),
    ]


def tilt_panels(title: str, tables: Mapping[str, Rows]) -> list[Panel]:
    """Errors and costs of every solve."""

    def shown(row: Mapping[str, Any]) -> dict[str, Any]:
        percent = {key: _percent(row[key]) for key in ("mean_error", "covariance_error")}
        passes = None if row["network_passes"] is None else row["network_passes"] / 1e6
        return {**row, **percent, "solver": row["solver"].replace("_", " "), "network_passes": passes}

    errors = ("mean_error", "covariance_error", "weight_error", "effective_samples")
    costs = ("stages", "samples", "updates", "network_passes", "ended")
    of_problem = ("problem", "contexts", "nats", "kl_weight", "solver")
    rows = [shown(row) for row in tables["tilts"]]
    return [_panel(title, rows, *of_problem, *errors, *costs).without_empty_columns()]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _panel(caption: str, rows: Rows, *keys: str) -> Panel:
    header = [_HEADERS.get(key, key.replace("_", " ")) for key in keys]
    return Panel(caption, header, [[number(row[key]) for key in keys] for row in rows])
