"""How diverse samples are: by the similarities of their features, and by the classes that they fall into."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def vendi(features: ArrayLike) -> float:
    """Vendi score (Friedman and Dieng 2023, definition 3.1) of the cosine similarities of samples.

    The exponential of the entropy of the eigenvalues of ``K / n``, with ``K`` the (n, n) matrix of cosine
    similarities: 1 for samples that are all alike, n for orthogonal ones. It is computed by the package
    vendi-score from the features' own (d, d) matrix, which has the same eigenvalues but for zeros.

    Args:
        features: (n, d); their lengths do not matter.

    Raises:
        ValueError: for fewer than 2 samples, or for features that are zero or not finite.
        ValueError: if the package vendi-score is not installed.
    """
    try:
        # Not score_X of the same package, which asks for a module that SciPy 2 will not have.
        from vendi_score.vendi import score_dual
    except ModuleNotFoundError:
        raise ValueError("vendi_score is not installed; pip install vendi-score") from None
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"a Vendi score needs features (n, d) of at least 2 samples, got shape {rows.shape}")
    largest = np.abs(rows).max(1, initial=0.0)
    bad = ~np.isfinite(largest) | (largest == 0)
    if bad.any():
        raise ValueError(
            f"a Vendi score needs finite features that are not all zero; {int(bad.sum())} of {len(rows)} "
            f"samples have others, the first at position {int(bad.argmax())}"
        )
    # The package takes lengths below 2e-15 for zero, and squares of others overflow.
    scale = np.where((largest > 1e-6) & (largest < 1e6), 1.0, largest)
    return float(score_dual(rows / scale[:, None]))


def shares(labels: ArrayLike, classes: int) -> np.ndarray:
    """Shares of the samples in each class, shape (classes,), summing to one.

    Args:
        labels: classes of the samples, integers from 0 to ``classes - 1``, (n,).
        classes: how many there are, with those that no sample is in.

    Raises:
        ValueError: if there is no sample, or a label is not such a class.
    """
    counts = _counts(labels, classes)
    found: np.ndarray = counts / counts.sum()
    return found


def designs_covered(labels: ArrayLike, classes: int, least: int = 1) -> int:
    """How many classes have at least ``least`` samples.

    Args:
        labels: see :func:`shares`.
        classes: see :func:`shares`.
        least: samples from which a class counts; more than one where the classifier makes mistakes.

    Raises:
        ValueError: see :func:`shares`; or for ``least`` below one, which counts classes without samples.
    """
    if least < 1:
        raise ValueError(f"a class is covered by at least one sample, got least={least}")
    return int((_counts(labels, classes) >= least).sum())


def effective_classes(labels: ArrayLike, classes: int) -> float:
    """Exponential of the entropy of the shares, the Hill number of order 1 (Hill 1973).

    From 1, all samples in one class, to ``classes``, the same share in each.

    Args:
        labels: see :func:`shares`.
        classes: see :func:`shares`.

    Raises:
        ValueError: see :func:`shares`.
    """
    taken = shares(labels, classes)
    taken = taken[taken > 0]
    return float(np.exp(-taken @ np.log(taken)))


def combinations_covered(labels: ArrayLike) -> int:
    """How many different combinations of classes there are.

    Args:
        labels: classes of the samples by each factor, (n, factors).

    Raises:
        ValueError: if there is no sample, or no factor, or the labels are not integers.
    """
    values = np.asarray(labels)
    if values.ndim != 2 or not values.size or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            "combinations are counted of classes (n, factors), integers and at least one; got "
            f"{values.dtype} of shape {values.shape}"
        )
    return len(np.unique(values, axis=0))


def _counts(labels: ArrayLike, classes: int) -> np.ndarray:
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"classes are counted of at least one sample, labels (n,); got shape {values.shape}")
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() >= classes:
        raise ValueError(
            f"labels are integers from 0 to {classes - 1}; got {values.dtype} from {values.min()} "
            f"to {values.max()}"
        )
    return np.bincount(values, minlength=classes)
