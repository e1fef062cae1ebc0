"""The exact distance of two sets of samples, by the package's optimal transport."""

import numpy as np

from flowtilt.metrics.transport import ground_distances, kantorovich


def wasserstein1(x, y, weights=None):
    """Wasserstein-1 distance of equally weighted samples, (n, ...) and (m, ...)."""
    cost = ground_distances(x, y, weights)
    n, m = cost.shape
    return kantorovich(cost, np.full(n, 1 / n), np.full(m, 1 / m)).value
