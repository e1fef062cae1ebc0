"""Degenerate input of every metric: a right value or a clear refusal, and never a silent number."""

import inspect

import numpy as np
import pytest

from exact_transport import wasserstein1
from flowtilt.metrics import diversity, entropy, tails, transport
from flowtilt.metrics.diversity import (
    combinations_covered,
    designs_covered,
    effective_classes,
    shares,
    vendi,
)
from flowtilt.metrics.entropy import histogram_entropy, likelihood_entropy
from flowtilt.metrics.tails import (
    dominance_violation,
    hinge,
    lower_tail_mean,
    quantile,
    tail_mean,
    upper_tail_mean,
)
from flowtilt.metrics.transport import check_metric, ground_distances, kantorovich, sliced_wasserstein

NAN, INF = np.nan, np.inf
COST, HALF = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0.5, 0.5])

REFUSED = [
    *((f, ([], 0.5), "at least one value") for f in (quantile, lower_tail_mean, upper_tail_mean)),
    *(
        (f, ([1, bad], 0.5), "finite values; 1 are not")
        for f in (quantile, lower_tail_mean, upper_tail_mean)
        for bad in (NAN, INF, -INF)
    ),
    *(
        (f, ([1, 2], mass), "must lie in")
        for f in (quantile, lower_tail_mean, upper_tail_mean)
        for mass in (0, -0.1, 1.1, NAN, INF)
    ),
    *(
        (f, ([1, 2], 0.5, w), "positive and finite")
        for f in (quantile, lower_tail_mean, upper_tail_mean)
        for w in ([0, 0], [1, -1], [NAN, 1], [INF, 1], [1e308, 1e308])
    ),
    (lower_tail_mean, ([1, 2], 0.5, [1]), "2 values and 1 weights"),
    *((tail_mean, ([], 0.5, tail), "at least one value") for tail in ("lower", "upper")),
    *((tail_mean, ([1, NAN], 0.5, tail), "finite values; 1 are not") for tail in ("left", "right")),
    *((tail_mean, ([1, 2], 0.5, tail), "a tail must be lower") for tail in ("both", "", None)),
    *((hinge, (np.ones(2), 0.0, mass, "upper"), "must lie in") for mass in (0, -0.1, 1.1, NAN, INF)),
    *((hinge, (np.ones(2), 0.0, 0.5, tail), "a tail must be lower") for tail in ("both", "", None)),
    (dominance_violation, ([], [1]), "at least one value"),
    (dominance_violation, ([1], []), "at least one value"),
    *((dominance_violation, pair, "finite values; 1 are not") for pair in (([NAN], [1]), ([1], [1, NAN]))),
    *(
        (dominance_violation, pair, "finite values; 2 are not")
        for pair in (([-INF], [INF]), ([NAN, INF], [0]))
    ),
    (likelihood_entropy, ([],), "at least one"),
    *((likelihood_entropy, ([0, bad],), "1 are not") for bad in (NAN, INF, -INF)),
    (histogram_entropy, (np.zeros((0, 2)), 1, 5), "none of 0 samples"),
    (histogram_entropy, ([[2, 2]], 1, 5), "none of 1 samples"),
    *((histogram_entropy, ([[0, 0], [0, bad]], 1, 5), "1 of 2 are not") for bad in (NAN, INF, -INF)),
    *(
        (histogram_entropy, (x, 1, 5), "samples .n, 2.")
        for x in ([0, 0], np.zeros((3, 3)), np.zeros((2, 2, 2)))
    ),
    *(
        (histogram_entropy, ([[0, 0]], *square), "a square and cells")
        for square in ((0, 5), (-1, 5), (NAN, 5), (INF, 5), (1, 0), (1, -2))
    ),
    *((vendi, (x,), "at least 2 samples") for x in ([], [1, 2], [[1, 2]], np.zeros((2, 2, 2)))),
    *(
        (vendi, ([[1, 0], bad],), "1 of 2 samples have others, the first at position 1")
        for bad in ([0, 0], [NAN, 1], [INF, 1])
    ),
    *(
        (f, (bad, 3), "at least one sample")
        for f in (shares, designs_covered, effective_classes)
        for bad in ([], [[0]], np.zeros(0, dtype=int))
    ),
    *(
        (f, (bad, 3), "labels are integers from 0 to 2")
        for f in (shares, designs_covered, effective_classes)
        for bad in ([3], [-1], [0.0], [NAN], [True])
    ),
    (shares, ([0], 0), "labels are integers"),
    (designs_covered, ([0], 3, 0), "at least one sample, got least=0"),
    *(
        (combinations_covered, (bad,), "combinations are counted")
        for bad in ([], [0, 1], np.zeros((3, 0), dtype=int), [[NAN, 1.0], [NAN, 1.0]])
    ),
    *((check_metric, (w,), "positive and finite") for w in ((), (0,), (-1,), (NAN,), (INF,))),
    (check_metric, ((1, 1), 3), "2 weights and the samples have 3"),
    *(
        (f, pair, "at least one sample")
        for f in (ground_distances, wasserstein1)
        for pair in (([], [1]), ([1], []), (np.zeros((0, 2)), np.zeros((0, 2))))
    ),
    *(
        (f, ([[0], [bad]], [[0]]), "finite samples")
        for f in (ground_distances, wasserstein1)
        for bad in (NAN, INF, -INF)
    ),
    *(
        (f, (np.zeros((2, 2)), np.zeros((2, 3))), "2 and of 3 coordinates have no")
        for f in (ground_distances, wasserstein1)
    ),
    *((f, ([[-1e308]], [[1e308]]), "too far apart") for f in (ground_distances, wasserstein1)),
    *(
        (f, (np.zeros((2, 0)), np.zeros((2, 0))), "positive and finite")
        for f in (ground_distances, wasserstein1)
    ),
    *(
        (kantorovich, (COST, p, HALF), "probabilities, which sum to one")
        for p in (np.zeros(2), np.array([2.0, -1.0]), np.array([NAN, 1]), np.array([INF, 0]), np.ones(2))
    ),
    *((kantorovich, (COST, HALF, q), "probabilities, which sum to one") for q in (np.zeros(2), HALF * 3)),
    *(
        (kantorovich, (np.array([[0, bad], [1, 0]]), HALF, HALF), "1 that are not finite")
        for bad in (NAN, INF)
    ),
    *(
        (sliced_wasserstein, pair, "finite points .n, 2., at least one")
        for bad in ([], [1.0, 2.0], np.zeros((2, 3)), np.zeros((0, 2)), [[NAN, 0]], [[0, INF]])
        for pair in ((bad, [[0, 0]]), ([[0, 0]], bad))
    ),
    *(
        (sliced_wasserstein, (COST, COST, p), "one probability a point, of sum 1")
        for p in (np.zeros(2), np.array([2.0, -1.0]), np.array([NAN, 1]), np.ones(1), np.ones(2))
    ),
    (sliced_wasserstein, ([[1e308, 0]], [[-1e308, 0]]), "too far apart"),
    (sliced_wasserstein, ([[1e300, 0]], [[0, 0]]), "too far apart"),
    (sliced_wasserstein, (COST, COST, None, None, 0), "at least one direction"),
    (kantorovich, (np.zeros((2, 3)), HALF, HALF), "finite costs of each pair, .2, 2.; got .2, 3."),
    (kantorovich, (np.zeros((0, 0)), np.zeros(0), np.zeros(0)), "probabilities"),
]

RIGHT = [
    (quantile, ([3], 1e-300), 3),
    (quantile, ([1, 2], 1e-320, [0, 1]), 2),
    (lower_tail_mean, ([7, 7, 7], 0.1), 7),
    (lower_tail_mean, ([5, 6], 1e-320), 5),
    (upper_tail_mean, ([1e308, 1e308], 1), 1e308),
    (tail_mean, ([1, 2], 1e-320, "left"), 1),
    (tail_mean, ([1, 2], 1e-320, "right"), 2),
    (upper_tail_mean, ([1, 2], 0.3, [1, 0]), 1),
    (dominance_violation, ([1, 1], [1, 1]), 0),
    (dominance_violation, ([0], [1]), 1),
    (likelihood_entropy, ([-2],), 2),
    (histogram_entropy, ([[0.1, 0.1]] * 3, 1, 5), 0),
    (histogram_entropy, ([[0.1, 0.1], [9, 9]], 1, 1), 0),
    (vendi, ([[1, 0]] * 4,), 1),
    *((vendi, ([[low, 0], [0, high]],), 2) for low, high in ((1e-14, 1e14), (1e-320, 1.7e308))),
    (effective_classes, ([2, 2], 3), 1),
    (designs_covered, ([2, 2], 3), 1),
    (combinations_covered, ([[0, 1], [0, 1]],), 1),
    (wasserstein1, ([0], [2]), 2),
    (wasserstein1, ([[1, 2]] * 3, [[1, 2]] * 5), 0),
    (wasserstein1, (np.array(1.0), np.array(3.0)), 2),
    (sliced_wasserstein, ([[1, 2]] * 3, [[1, 2]] * 5), 0),
    (sliced_wasserstein, ([[0, 0], [9, 9]], [[0, 0]], [1, 0]), 0),
    (sliced_wasserstein, ([[2, 0]], [[0, 0]]), np.sqrt(2)),
    (lambda *a: kantorovich(*a).value, (COST, np.array([1.0, 0.0]), np.array([0.0, 1.0])), 1),
    (lambda *a: kantorovich(*a).value, (np.array([[3.0]]), np.ones(1), np.ones(1)), 3),
    (lambda *a: kantorovich(*a).value, (np.zeros((2, 2)), HALF, HALF), 0),
]


def test_every_metric_is_in_the_table():
    known = {function for function, *_ in REFUSED}
    for module in (diversity, entropy, tails, transport):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert function in known, name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_degenerate_input_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(("function", "arguments", "value"), RIGHT)
def test_what_is_extreme_but_defined_has_its_value(function, arguments, value):
    assert function(*arguments) == pytest.approx(value, rel=1e-9, abs=1e-12)
