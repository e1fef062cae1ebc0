"""A stand-in for the package FlowMol and for dgl, with what the adapter uses of them and nothing else.

The real packages need versions of torch and of Python that are not the project's, and their weights are
downloaded. What stands in has the same names, arguments and attributes; its network is another: small,
equivariant, and a function of all features and of the time.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

NAMES = ("qm9_gaussian", "qm9_ctmc", "qm9_dirichlet", "qm9_simplexflow", "geom_gaussian")
HYPERPARAMETERS = {"n_hidden_scalars": 8}
SIZES, SHARES = torch.tensor([2, 3, 5]), torch.tensor([0.2, 0.3, 0.5])


class Graph:
    """Nodes and directed edges with their data."""

    def __init__(self, edges: tuple[Tensor, Tensor], num_nodes: int) -> None:
        assert len(edges[0]) == len(edges[1])
        assert not len(edges[0]) or int(torch.stack(edges).max()) < num_nodes
        self._edges, self._nodes = edges, num_nodes
        self.ndata: dict[str, Tensor] = {}
        self.edata: dict[str, Tensor] = {}

    def edges(self) -> tuple[Tensor, Tensor]:
        return self._edges

    def num_nodes(self) -> int:
        return self._nodes


class InterpolantScheduler(nn.Module):
    """Holds the schedules; nu of a cosine is a tensor of one number, as in the real one."""

    def __init__(self, canonical_feat_order, schedule_type="cosine", cosine_params={}):  # noqa: B006
        super().__init__()
        assert set(schedule_type) == set(canonical_feat_order)
        self.schedule_dict = dict(schedule_type)
        self.cosine_params = {key: torch.tensor(nu).unsqueeze(0) for key, nu in cosine_params.items()}


class EndpointVectorField(nn.Module):
    """Predicts the endpoint of every feature by one round of messages along the edges."""

    def __init__(
        self,
        n_atom_types: int,
        canonical_feat_order: list[str],
        interpolant_scheduler: nn.Module,
        n_charges: int = 6,
        n_bond_types: int = 5,
        n_hidden_scalars: int = 64,
    ) -> None:
        super().__init__()
        self.interpolant_scheduler = interpolant_scheduler
        self.n_atom_types, width = n_atom_types, n_hidden_scalars
        self.nodes = nn.Linear(n_atom_types + n_charges + 1, width)
        self.messages = nn.Sequential(nn.Linear(2 * width + n_bond_types + 1, width), nn.SiLU())
        self.pulls, self.bonds = nn.Linear(width, 1), nn.Linear(width, n_bond_types)
        self.heads = nn.Linear(2 * width, n_atom_types + n_charges)

    def forward(
        self,
        g: Graph,
        t: Tensor,
        node_batch_idx: Tensor,
        upper_edge_mask: Tensor,
        apply_softmax: bool = False,
        remove_com: bool = False,
    ) -> dict[str, Tensor]:
        x = g.ndata["x_t"]
        nodes = self.nodes(torch.cat([g.ndata["a_t"], g.ndata["c_t"], t[node_batch_idx, None]], dim=1))
        source, target = g.edges()
        # Both directions of a bond have the same features, one in the upper part and one in the lower.
        assert torch.equal(source[upper_edge_mask], target[~upper_edge_mask])
        apart = x[source] - x[target]
        far = 1 / (1 + apart.square().sum(1, keepdim=True))
        messages = self.messages(torch.cat([nodes[source], nodes[target], g.edata["e_t"], far], dim=1))
        zeros = x.new_zeros
        # The best linear prediction for data of unit variance on the coordinates' path.
        alpha = torch.sin(torch.pi / 2 * t[node_batch_idx, None]) ** 2
        scale = alpha / (alpha**2 + (1 - alpha) ** 2)
        moved = scale * x - zeros(x.shape).index_add(
            0, target, apart * far * torch.tanh(self.pulls(messages))
        )
        gathered = zeros(len(x), messages.shape[1]).index_add(0, target, messages)
        heads = self.heads(torch.cat([nodes, gathered], dim=1))
        pairs = messages[upper_edge_mask] + messages[~upper_edge_mask]
        found = {
            "a": heads[:, : self.n_atom_types],
            "c": heads[:, self.n_atom_types :],
            "e": self.bonds(pairs),
        }
        if apply_softmax:
            found = {feature: logits.softmax(1) for feature, logits in found.items()}
        assert not remove_com
        return {"x": moved, **found}


class FlowMol(nn.Module):
    """What load_pretrained gives: a network, its settings, and the distribution of sizes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind = name.split("_")[1]
        heavier = ["P", "S", "Cl", "Br", "I"] if name.startswith("geom") else []
        self.atom_type_map = ["C", "H", "N", "O", "F", *heavier]
        self.canonical_feat_order = ["x", "a", "c", "e"]
        self.n_atom_charges, self.n_bond_types = 6, 5
        self.parameterization = kind if kind in ("ctmc", "dirichlet") else "endpoint"
        categories = {"gaussian": "gaussian", "ctmc": "ctmc", "dirichlet": "uniform-simplex"}
        prior = {"align": False, "kwargs": {}, "type": categories.get(kind, "marginal")}
        marginal = {**prior, "kwargs": {"p": torch.ones(5) / 5}} if kind == "simplexflow" else prior
        self.prior_config: dict[str, dict[str, Any]] = {
            "x": {"align": True, "kwargs": {"std": 1.0}, "type": "centered-normal"},
            **dict.fromkeys("ace", marginal),
        }
        self.hparams = {"vector_field_config": HYPERPARAMETERS}
        self.interpolant_scheduler = InterpolantScheduler(
            self.canonical_feat_order, dict.fromkeys("xace", "cosine"), {"x": 1, "a": 2, "c": 2, "e": 1.5}
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.vector_field = EndpointVectorField(
                len(self.atom_type_map),
                self.canonical_feat_order,
                self.interpolant_scheduler,
                **HYPERPARAMETERS,
            )
        self.n_atoms_map, self.n_atoms_dist = SIZES, SimpleNamespace(probs=SHARES)


def load_pretrained(model_name: str) -> FlowMol:
    if model_name not in NAMES:
        raise ValueError(f"Model {model_name} not found. Supported models: {list(NAMES)}")
    return FlowMol(model_name)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``import flowmol`` and ``import dgl`` find what stands in for them."""
    modules = {
        "flowmol": {"load_pretrained": load_pretrained},
        "flowmol.models": {},
        "flowmol.models.vector_field": {"EndpointVectorField": EndpointVectorField},
        "flowmol.models.interpolant_scheduler": {"InterpolantScheduler": InterpolantScheduler},
        "dgl": {"graph": Graph},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
