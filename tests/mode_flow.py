"""A flow whose context is a mode, with one exact flow for each mode."""

import torch

from closed_forms import Mixture, MixtureFlow
from flowtilt.interpolants import Interpolant
from flowtilt.model import FlowModel


class Modes(FlowModel):
    """Given the mode z, an integer for each sample, the flow ``flows[z]``; z is uniform."""

    def __init__(self, flows: list[FlowModel]):
        super().__init__()
        self.path, self.data_variance = flows[0].path, 1.0
        self.flows = torch.nn.ModuleList(flows)

    def prior(self, count, generator, context=None):
        return self.flows[0].prior(count, generator)

    def velocity(self, x, t, context=None):
        each = torch.stack([flow.velocity(x, t) for flow in self.flows])
        return each[context, torch.arange(len(x))]

    def draw_context(self, count, generator):
        return torch.randint(len(self.flows), (count,), generator=generator)

    def select_context(self, context, index):
        return context[index]


class ModeFlow(Modes):
    """The exact flow of ``distributions[z]``."""

    def __init__(self, path: Interpolant, distributions: list[Mixture]):
        super().__init__([MixtureFlow(path, distribution) for distribution in distributions])
        self.distributions = distributions
