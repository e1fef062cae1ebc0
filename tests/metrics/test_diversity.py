"""Diversity of samples against closed forms, NumPy's eigenvalues and the package of the Vendi score."""

import math
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from vendi_score.vendi import score_X

from flowtilt.metrics.diversity import (
    combinations_covered,
    designs_covered,
    effective_classes,
    shares,
    vendi,
)


def eigenvalue_entropy(features: np.ndarray) -> float:
    """Of the matrix of cosine similarities over n, in nats."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    positive = eigenvalues[eigenvalues > 0]
    return float(-positive @ np.log(positive))


@pytest.mark.parametrize(("count", "width"), [(12, 5), (5, 12), (8, 8), (60, 16)])
def test_vendi_is_that_of_the_package_and_of_the_eigenvalues(count, width):
    """The eigenvalues are right to the machine precision times n; those of zero add p log p a piece."""
    features = np.random.default_rng(count).normal(size=(count, width)) + 0.4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of scipy.sparse.csr, in the package
        from_samples = score_X(features)
    assert vendi(features) == pytest.approx(from_samples, rel=1e-11)
    assert vendi(features) == pytest.approx(math.exp(eigenvalue_entropy(features)), rel=1e-11)


@pytest.mark.parametrize("width", [6, 9])
def test_vendi_of_orthogonal_samples_is_their_number_whatever_their_lengths(width):
    features = np.diag(np.arange(1.0, 7.0)) @ np.eye(6, width)
    assert vendi(features) == pytest.approx(6, rel=1e-11)


def test_vendi_of_equal_samples_is_one():
    assert vendi(np.outer([1.0, 2.0, 0.5], [3.0, -1.0, 2.0, 0.0])) == pytest.approx(1, rel=1e-11)


def test_vendi_of_two_samples_is_a_function_of_their_angle():
    """The eigenvalues of K / 2 are (1 +- cos) / 2."""
    for angle in (0.3, 1.0, 2.0):
        p = (1 + math.cos(angle)) / 2
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        found = vendi([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        assert found == pytest.approx(math.exp(entropy), rel=1e-11)


def test_vendi_of_groups_is_the_effective_number_of_groups():
    """Samples alike within orthogonal groups have the shares of the groups as eigenvalues."""
    labels = np.repeat([0, 1, 2], [5, 3, 2])
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0]
    assert vendi(axes[labels]) == pytest.approx(effective_classes(labels, 3), rel=1e-11)


def test_vendi_takes_single_precision():
    """To the rounding of the features, on which the score depends smoothly."""
    features = np.random.default_rng(4).normal(size=(20, 6))
    assert vendi(features.astype(np.float32)) == pytest.approx(vendi(features), rel=1e-5)


def test_bad_features_are_explained():
    with pytest.raises(ValueError, match=r"at least 2 samples, got shape \(1, 3\)"):
        vendi([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        vendi([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="1 of 3 samples have others, the first at position 1"):
        vendi([[1.0, 0.0], [math.nan, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="2 of 3 samples have others, the first at position 0"):
        vendi([[0.0, 0.0], [math.inf, 1.0], [1.0, 1.0]])


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vendi_score.vendi", None)
    with pytest.raises(ValueError, match="vendi_score is not installed; pip install vendi-score"):
        vendi(np.eye(3))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(7, 9), st.integers(1, 4))
def test_classes_are_counted_one_by_one(labels, classes, least):
    counts = [labels.count(label) for label in range(classes)]
    np.testing.assert_allclose(shares(labels, classes), [count / len(labels) for count in counts])
    assert designs_covered(labels, classes, least) == sum(count >= least for count in counts)
    assert effective_classes(labels, classes) == pytest.approx(math.exp(scipy.stats.entropy(counts)))


def test_effective_classes_of_equal_shares_is_their_number():
    assert effective_classes([0, 1, 2, 3, 0, 1, 2, 3], 5) == pytest.approx(4)
    assert effective_classes([2, 2, 2], 5) == 1
    assert designs_covered([2, 2, 0], 5) == 2
    assert designs_covered([2, 2, 0], 5, least=2) == 1


@pytest.mark.parametrize("function", [shares, designs_covered, effective_classes])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one sample"),
        ([[0, 1]], r"got shape \(1, 2\)"),
        ([0, 5], "integers from 0 to 4; got int64 from 0 to 5"),
        ([-1, 2], "from -1 to 2"),
        ([0.0, 1.0], "got float64"),
    ],
)
def test_bad_labels_are_explained(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(labels, 5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 1)), min_size=1))
def test_combinations_are_different_tuples(labels):
    assert combinations_covered(labels) == len(set(labels))


@pytest.mark.parametrize("labels", [[], [0, 1], np.empty((3, 0))])
def test_combinations_need_a_sample_and_a_factor(labels):
    with pytest.raises(ValueError, match="combinations are counted"):
        combinations_covered(labels)
