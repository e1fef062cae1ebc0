"""Figures of molecules: energies by method with tails marked, drawings of molecules, masses of the tail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flowtilt.domains.molecules.tables import MassLine, masses
from flowtilt.files import atomic_path
from flowtilt.metrics.tails import quantile, upper_tail_mean
from flowtilt.pipeline.report.base import Shown
from flowtilt.pipeline.report.frontier import draw_frontier
from flowtilt.pipeline.report.measurements import ResultsError, Runs, models_of, read_arrays, run_folder
from flowtilt.pipeline.report.panels import describe, pretty
from flowtilt.pipeline.report.style import COLOURS, SHADE, reported_tails, save_figure

if TYPE_CHECKING:
    from rdkit.Chem import Mol

_CASES = {
    "plain": "#56B4E9",
    "pool": "#009E73",
    "large_pool": "#E69F00",
    "rising": "#D55E00",
    "fitted": "#CC79A7",
}


@dataclass(frozen=True)
class Generated:
    """What one run's molecules are worth.

    Attributes:
        reward: minus their energies in hartree, (molecules,), NaN for failures.
        valid: bools, (molecules,).
    """

    reward: np.ndarray
    valid: np.ndarray


def load_generated(results: str | Path, runs: Runs, method: str) -> Generated:
    """The energies of a method's molecules, pooled over seeds. Raises ResultsError if a file is missing or
    malformed."""
    rewards, valid = [], []
    for seed in runs.seeds:
        path = run_folder(results, runs, method, "network", seed) / "energies.npz"
        arrays = read_arrays(path, "reward", "valid")
        rewards.append(arrays["reward"])
        valid.append(arrays["valid"])
    return Generated(np.concatenate(rewards), np.concatenate(valid).astype(bool))


def energies_figure(
    runs: Runs, generated: Mapping[str, Generated], reported: Mapping[str, Mapping[str, float]]
) -> Figure:
    """How minus the energies are distributed, a panel a method, with the best share marked."""
    every = np.concatenate([own.reward[np.isfinite(own.reward)] for own in generated.values()])
    edges = np.linspace(math.floor(every.min()), math.ceil(every.max()), 61)
    figure = Figure(figsize=(7.2, 1.6 * len(runs.methods) + 1.0))
    panels = figure.subplots(len(runs.methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, method in zip(panels, runs.methods, strict=True):
        own, colour = generated[method.name], COLOURS[method.kind]
        kept = np.isfinite(own.reward)
        for chosen, alpha in ((kept, 0.3), (kept & own.valid, 0.6)):
            shares = np.histogram(own.reward[chosen], edges)[0] / len(own.reward)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=alpha)
        axes.set(ylim=(0.3 / len(every), 1.0), ylabel="share of\nmolecules", yscale="log")
        axes.set_title(method.name, loc="left", color=colour, fontweight="bold")
        if kept.any():
            axes.set_title(_mark_tail(axes, runs, method.name, own, reported), loc="right", fontsize=9)
    panels[-1].set_xlabel("minus the energy (hartree)")
    figure.suptitle(runs.title or runs.name)
    share = f"best {100 * runs.mass:.3g} %"
    handles: list[Any] = [
        Patch(color="#6b6b6b", alpha=0.3, label="all with an energy"),
        Patch(color="#6b6b6b", alpha=0.75, label="valid"),
        Patch(color=SHADE, alpha=0.4, label=share),
        Line2D([], [], color="black", linewidth=1.5, label=f"mean of the {share}"),
        Line2D([], [], color="black", marker="v", linestyle="", label="reported"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _mark_tail(
    axes: Any, runs: Runs, method: str, own: Generated, reported: Mapping[str, Mapping[str, float]]
) -> str:
    """Shade the tail, draw its mean, point at reported ones; what is said of it."""
    rewards = own.reward[np.isfinite(own.reward)]
    mean = upper_tail_mean(rewards, runs.mass)
    axes.axvspan(quantile(rewards, 1 - runs.mass), rewards.max(), color=SHADE, alpha=0.4, linewidth=0)
    axes.axvline(mean, ymax=0.8, color="black", linewidth=1.5)
    said = [f"{describe(runs.tail_metric).words} {pretty(mean)}, valid {100 * own.valid.mean():.1f} %"]
    for source, values in reported.items():
        if method in values:
            place = {"transform": axes.get_xaxis_transform(), "clip_on": True}
            axes.plot([values[method]], [0.9], marker="v", markersize=7, color="black", **place)
            said.append(f"reported ({source}) {values[method]:g}")
    return "; ".join(said)


SHOWN = 4
"""Best and random molecules of each method in the drawing."""


def draw_molecules(path: str | Path, rows: Sequence[tuple[str, Sequence[tuple[Mol, str]]]]) -> None:
    """Write structures as PNG, a row a method."""
    from rdkit.Chem.Draw import rdMolDraw2D

    width, height = 230, 210
    columns = max(len(molecules) for _, molecules in rows)
    canvas = rdMolDraw2D.MolDraw2DCairo(width * columns, height * len(rows), width, height)
    options: Any = canvas.drawOptions()
    options.legendFontSize = 15
    options.prepareMolsBeforeDrawing = False
    molecules: list[Any] = []
    legends: list[str] = []
    for name, own in rows:
        padding = [(None, "")] * (columns - len(own))
        for molecule, legend in [*own, *padding]:
            molecules.append(molecule)
            legends.append(f"{name}: {legend}" if legend else "")
    canvas.DrawMolecules(molecules, legends=legends)
    canvas.FinishDrawing()
    with atomic_path(path) as temporary:
        temporary.write_bytes(canvas.GetDrawingText())


def shown_molecules(sdf: Path, count: int = SHOWN) -> list[tuple[Mol, str]]:
    """The best valid molecules of a run, and the first ones, which are random, with their rewards.

    Valid molecules are drawn by their structure; the others by their geometry, without bonds.

    Raises:
        ResultsError: if the run's molecules are missing.
    """
    from flowtilt.domains.molecules.sdf import SdfError, read_sdf

    try:
        records = read_sdf(sdf)
    except SdfError as error:
        raise ResultsError(f"{error}; make it with `snakemake --cores all {sdf}`") from None
    energies = [float(record.properties.get("energy_hartree", "nan")) for record in records]
    valid = [i for i, record in enumerate(records) if "smiles" in record.properties]
    best = sorted((i for i in valid if math.isfinite(energies[i])), key=lambda i: energies[i])[:count]
    chosen = [(i, "best") for i in best] + [(i, "random") for i in range(min(count, len(records)))]
    shown = []
    for i, word in chosen:
        properties = records[i].properties
        reward = f"{-energies[i]:.2f}" if math.isfinite(energies[i]) else "no energy"
        invalid = "" if "smiles" in properties else ", invalid"
        shown.append((_flat(records[i], properties.get("smiles")), f"{word} {reward}{invalid}"))
    return shown


def _flat(record: Any, smiles: str | None) -> Mol:
    """A molecule with coordinates in the plane."""
    from rdkit import Chem
    from rdkit.Chem import rdDepictor
    from rdkit.Chem.Draw import rdMolDraw2D

    from flowtilt.domains.molecules.chemistry import without_bonds

    if smiles is None:
        return Chem.Mol(without_bonds(record.molecule))
    molecule = Chem.MolFromSmiles(smiles)
    rdDepictor.Compute2DCoords(molecule)
    return rdMolDraw2D.PrepareMolForDrawing(molecule)


FRONTIER = (
    *("mean_negative_energy", "top_10pct_negative_energy", "top_1pct_negative_energy"),
    *("top_0.2pct_negative_energy", "validity_pct"),
)
"""Metrics of the figure of frontiers."""

_PANELS = (
    ("gain", "tail mean over pretrained (hartree)"),
    ("validity", "valid (%)"),
    ("active", "active samples (share)"),
    ("passes", "network passes in training"),
)


def masses_figure(lines: Sequence[MassLine], title: str) -> Figure:
    """What each mass reaches and costs, a panel a quantity, a curve a case."""
    known = sorted({line.mass for line in lines}, reverse=True)
    place = {mass: i for i, mass in enumerate(known)}
    figure = Figure(figsize=(8.6, 6.4))
    panels = figure.subplots(2, 2, sharex=True).ravel()
    cases = list(dict.fromkeys(line.case for line in lines if line.case != "reference"))
    for axes, (quantity, words) in zip(panels, _PANELS, strict=True):
        for case in cases:
            own = [line for line in lines if line.case == case]
            values = [getattr(line, quantity) for line in own]
            colour = _CASES.get(case, "black")
            axes.plot([place[line.mass] for line in own], values, "o-", color=colour, label=case)
        for method, style in (("pretrained", ":"), ("am", "--")):
            own = [line for line in lines if line.case == "reference" and line.method == method]
            values = [getattr(line, quantity) for line in own]
            if quantity != "active" and np.isfinite(values).any():
                axes.plot([place[line.mass] for line in own], values, style, color="#6b6b6b", label=method)
        axes.set_ylabel(words)
        axes.set_xticks(range(len(known)), [f"{mass:g}" for mass in known])
    panels[2].set_yscale("symlog", linthresh=1e-3)
    panels[2].set_ylim(0, 1.5)
    for axes in panels[2:]:
        axes.set_xlabel("mass of the tail")
    figure.suptitle(title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def draw(shown: Shown, prefix: str) -> None:
    """Draw ``{prefix}_energies.png`` and ``{prefix}_molecules.png`` of an experiment, and
    ``{prefix}_frontier.png`` if a method has a budget. Of a study
    ``{prefix}.png``: what each level of the tail reaches."""
    results = shown.results
    if shown.study is not None:
        save_figure(masses_figure(masses(results, shown.experiments), shown.title), f"{prefix}.png")
        return
    draw_frontier(shown, prefix, FRONTIER)
    runs = models_of(shown.experiments[0])
    generated = {m.name: load_generated(results, runs, m.name) for m in runs.methods}
    figure = energies_figure(runs, generated, reported_tails(shown.reported, runs))
    save_figure(figure, f"{prefix}_energies.png")
    folders = {m.name: run_folder(results, runs, m.name, "network", runs.seeds[0]) for m in runs.methods}
    rows = [(name, shown_molecules(folder / "molecules.sdf")) for name, folder in folders.items()]
    draw_molecules(f"{prefix}_molecules.png", rows)
