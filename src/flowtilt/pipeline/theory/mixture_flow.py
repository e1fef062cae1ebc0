"""A flow whose velocity, distribution and tilts are known exactly: mixtures of Gaussians in contexts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from flowtilt.interpolants import Interpolant
from flowtilt.model import Context, FlowModel
from flowtilt.theory.gaussian_mixtures import GaussianMixture


class MixtureFlow(FlowModel):
    """Given the context, the exact flow of a mixture of Gaussians; contexts are equally probable.

    Weights, means and covariances are parameters, so that a solver can reach every tilt by a quadratic
    reward, and what it has reached is read off. Given the component ``N(m, S)``, ``x_t`` has the covariance
    ``Sigma = alpha^2 S + beta^2``; with ``r = Sigma^-1 (x - alpha m)`` the velocity is
    ``alpha' (m + alpha S r) + beta' beta r``, averaged with the components' posterior shares.

    Args:
        path: the interpolant.
        mixtures: one a context, all with as many components.
    """

    data_variance = 1.0

    def __init__(self, path: Interpolant, mixtures: Sequence[GaussianMixture]) -> None:
        super().__init__()
        self.path = path

        def stacked(arrays: list[np.ndarray]) -> nn.Parameter:
            return nn.Parameter(torch.tensor(np.stack(arrays)))

        self.logits = stacked([np.log(each.weights) for each in mixtures])
        self.means = stacked([each.means for each in mixtures])
        self.factors = stacked([np.linalg.cholesky(each.covariances) for each in mixtures])

    @property
    def covariances(self) -> Tensor:
        """(contexts, k, d, d)."""
        lower = torch.tril(self.factors)
        return lower @ lower.mT

    def mixtures(self) -> list[GaussianMixture]:
        """The distributions as they are now."""
        arrays = (torch.softmax(self.logits, 1), self.means, self.covariances)
        own = zip(*(each.numpy(force=True) for each in arrays), strict=True)
        return [GaussianMixture(weights, means, covariances) for weights, means, covariances in own]

    def draw_context(self, count: int, generator: torch.Generator) -> Context:
        return torch.randint(len(self.logits), (count,), generator=generator)

    def select_context(self, context: Context, index: Tensor) -> Context:
        return context[index]

    def context_labels(self, context: Context) -> Tensor | None:
        return context if len(self.logits) > 1 else None

    def prior(self, count: int, generator: torch.Generator, context: Context = None) -> Tensor:
        return torch.randn(count, self.means.shape[-1], generator=generator, dtype=torch.float64)

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        if context is None or len(self.logits) == 1:
            return self._given(x, t, 0)
        out = torch.empty_like(x)
        for number in range(len(self.logits)):
            own = context == number
            out = out.index_put((own,), self._given(x[own], t[own] if t.ndim else t, number))
        return out

    def _given(self, x: Tensor, t: Tensor, number: int) -> Tensor:
        """The velocity given a context, (n, d); at one time small matrices stand before all samples."""
        path, time = self.path, t.double()[..., None]
        a, a_rate, b, b_rate = (c(time) for c in (path.alpha, path.alpha_rate, path.beta, path.beta_rate))
        s, eye = self.covariances[number], torch.eye(x.shape[-1], dtype=torch.float64)
        s = s[:, None] if t.ndim else s  # (k, d, d), or (k, n, d, d) with a time for each sample
        precisions = torch.linalg.inv((a**2)[..., None] * s + (b**2)[..., None] * eye)
        slopes = ((a_rate * a)[..., None] * s + (b_rate * b)[..., None] * eye) @ precisions

        def times(vectors: Tensor, matrices: Tensor) -> Tensor:
            """Symmetric matrices times vectors (k, n, d)."""
            return (matrices @ vectors[..., None])[..., 0] if t.ndim else vectors @ matrices

        means = self.means[number][:, None]
        centred = x - a * means
        each = times(centred, slopes) + a_rate * means
        if len(each) == 1:
            return each[0]
        squares = (times(centred, precisions) * centred).sum(-1)
        determinants = torch.logdet(precisions)
        halves = 0.5 * ((determinants if t.ndim else determinants[:, None]) - squares)
        return (torch.softmax(self.logits[number][:, None] + halves, 0)[..., None] * each).sum(0)
