"""A flow whose context is a mode, with one exact flow for each mode."""

import torch

from closed_forms import Mixture, MixtureFlow
from flowtilt.interpolants import Interpolant
from flowtilt.model import FlowModel


class ModeFlow(FlowModel):
    """Given the mode z, an integer for each sample, the exact flow of ``laws[z]``; z is uniform."""

    def __init__(self, path: Interpolant, laws: list[Mixture]):
        super().__init__()
        self.path, self.laws, self.data_variance = path, laws, 1.0
        self.flows = torch.nn.ModuleList(MixtureFlow(path, law) for law in laws)

    def prior(self, count, generator, context=None):
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def velocity(self, x, t, context=None):
        each = torch.stack([flow.velocity(x, t) for flow in self.flows])
        return each[context, torch.arange(len(x))]

    def draw_context(self, count, generator):
        return torch.randint(len(self.laws), (count,), generator=generator)

    def select_context(self, context, index):
        return context[index]
