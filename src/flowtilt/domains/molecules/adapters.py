"""Low-rank adapters of the linear layers of a flow on molecules (Hu et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtilt.checkpoints import load_weights, notes_of
from flowtilt.domains.molecules.sections import MoleculeAdapterConfig
from flowtilt.model import FlowModel
from flowtilt.seeding import seed_of

HEADER = "molecule_adapter"
"""Key of a checkpoint's header under which rank and scale stand: its weights say nothing without."""


class LowRank(nn.Module):
    """A linear layer with ``alpha / rank`` times a product of two thin matrices beside its weights.

    One of them is zero at first: the layer then is what it was. As the layer itself, the product acts on
    features alone, so that what is equivariant stays so.
    """

    def __init__(self, linear: nn.Linear, config: MoleculeAdapterConfig) -> None:
        super().__init__()
        own = linear.weight
        self.linear, self.scale = linear, config.alpha / config.rank
        self.down = nn.Parameter(torch.randn(config.rank, own.shape[1]).to(own) / config.rank)
        self.up = nn.Parameter(own.new_zeros(own.shape[0], config.rank))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)
        return found


class AdaptedFlow(FlowModel):
    """A flow that may be given adapters, which a fine-tuning then changes alone. Its checkpoints hold all."""

    adapter: MoleculeAdapterConfig | None = None

    def add_adapter(self, config: MoleculeAdapterConfig) -> None:
        """Give each linear layer an adapter; their first weights follow from the rank alone."""
        self.adapter = config
        places = [
            (module, name)
            for module in self.modules()
            for name, child in module.named_children()
            if isinstance(child, nn.Linear)
        ]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("adapter", config.rank))
            for module, name in places:
                setattr(module, name, LowRank(getattr(module, name), config))

    def tunable(self) -> list[nn.Parameter]:
        if self.adapter is None:
            return super().tunable()
        adapters = [module for module in self.modules() if isinstance(module, LowRank)]
        return [p for one in adapters for p in (one.down, one.up)]

    def header(self) -> dict[str, str]:
        if self.adapter is None:
            return {}
        return {HEADER: json.dumps(self.adapter.model_dump(), sort_keys=True)}

    def check_header(self, header: Mapping[str, str]) -> None:
        found, own = header.get(HEADER), self.header().get(HEADER)
        if found != own:
            raise ValueError(
                f"its adapter is {found or 'none'}, and the configuration's key adapter is {own or 'none'}"
            )


Flow = TypeVar("Flow", bound=AdaptedFlow)


def load_adapted(flow: Flow, weights: Path, adapter: MoleculeAdapterConfig | None) -> Flow:
    """A flow with the weights of a pretrained model, and new adapters, or with all of a fine-tuned one.

    Raises:
        CheckpointError: as :func:`flowtilt.checkpoints.load_weights`, also where the adapters differ.
    """
    if adapter is None:
        return load_weights(flow, weights)
    tuned = HEADER in notes_of(weights)
    if not tuned:
        load_weights(flow, weights)
    flow.add_adapter(adapter)
    return load_weights(flow, weights) if tuned else flow.requires_grad_(False)
