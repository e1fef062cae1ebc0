"""Two estimates of a distribution's entropy from samples, both in Flow Density Control's official code."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def likelihood_entropy(log_density: ArrayLike) -> float:
    """Differential entropy in nats: minus the mean log-density of a distribution at its own samples.

    Unbiased where the log-densities are right; its standard error is their standard deviation over
    the root of their number.

    Args:
        log_density: in nats, (n,).

    Raises:
        ValueError: if there is none, or one is not finite.
    """
    values = np.asarray(log_density, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an entropy needs at least one log-density")
    if not np.isfinite(values).all():
        raise ValueError(
            f"an entropy needs finite log-densities; {int((~np.isfinite(values)).sum())} are not"
        )
    return -float(values.mean())


def histogram_entropy(samples: ArrayLike, extent: float, bins: int) -> float:
    """Entropy in nats of a histogram of the plane: ``bins`` x ``bins`` cells of ``[-extent, extent]^2``.

    This is the entropy of the *cells*: that of the distribution is lower by the log of their number a unit
    of area, ``2 log(bins / (2 extent))``, once there are many samples a cell. With fewer it lies
    below, by about the number of occupied cells less one over twice the number of samples (Miller
    1955), and it never exceeds the log of the number of samples. Samples off the square are left out.

    Args:
        samples: (n, 2).
        extent: half the side of the square.
        bins: cells along a side.

    Raises:
        ValueError: if no sample lies on the square, one is not finite or not (2,), or there is no cell.
    """
    points = np.asarray(samples, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"a histogram of the plane needs samples (n, 2), got shape {points.shape}")
    if bad := int((~np.isfinite(points).all(1)).sum()):
        raise ValueError(f"a histogram needs finite samples; {bad} of {len(points)} are not")
    if not 0 < extent < np.inf or bins < 1:
        raise ValueError(f"a histogram needs a square and cells, got extent {extent} and bins {bins}")
    edges = np.linspace(-extent, extent, bins + 1)
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0]
    inside = counts.sum()
    if inside == 0:
        raise ValueError(f"none of {len(points)} samples lies on the square of half side {extent}")
    shares = counts[counts > 0] / inside
    return -float(shares @ np.log(shares))
