"""Tables and figures of molecules, from made-up metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flowtilt.domains.molecules.evaluation import MASSES
from flowtilt.domains.molecules.experiment import MoleculeExperiment, tail_metric
from flowtilt.domains.molecules.figures import Generated, energies_figure, load_generated, masses_figure
from flowtilt.domains.molecules.tables import MassLine, masses, masses_panel
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.files import write_arrays, write_history, write_rows
from flowtilt.pipeline.report.claims import decided
from flowtilt.pipeline.report.costs import costs_of
from flowtilt.pipeline.report.measurements import ResultsError, runs_of
from flowtilt.pipeline.report.panels import describe
from flowtilt.pipeline.report.style import figure_style, save_figure
from flowtilt.pipeline.report.tables import write_comparison, write_table
from small_molecules import CONFIG

EXPERIMENTS = CONFIG / "experiments"
QM9, SWEEP = EXPERIMENTS / "molecules_qm9.yaml", EXPERIMENTS / "molecules_tail_sweep.yaml"
REPORTED = CONFIG / "reported_results.csv"

MEANS = {"data": 25.5, "pretrained": 25.0, "am": 25.3, "fdc": 25.15}


def made_up(method: str, seed: int) -> dict[str, float | None]:
    """Metrics of one run: am raises the mean by 0.3, tails rise as they narrow, fdc misses am's best."""
    mean = MEANS.get(method, 25.2) + 0.01 * seed
    row: dict[str, float | None] = {"mean_negative_energy": mean, "validity_pct": 70.0}
    row |= {tail_metric(mass): mean + 10 * (1 - mass) for mass in MASSES}
    row["valid_top_0.2pct_negative_energy"] = None
    if method not in ("data", "pretrained"):
        row |= {"active_share": 0.02, "inactive_updates": 0.5, "training_energies": 640.0}
    return row


def write(results: Path, experiment: MoleculeExperiment) -> None:
    for method, config in experiment.methods.items():
        for seed in experiment.seeds:
            folder = results / "runs" / experiment.name / method / f"seed{seed}"
            write_rows({method: made_up(method, seed)}, folder / "metrics.json")
            if config.tuned:
                rows: list[dict[str, float]] = [
                    {"update": i, "seconds": 4.0 * i + 5, "network_passes": 700 * i + 800} for i in (0, 1)
                ]
                write_history(rows, folder / "history.csv")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for file in (QM9, SWEEP):
        for experiment in load_file(file).values():
            write(tmp_path, experiment)
    return tmp_path


def test_the_table_stands_beside_both_sources(results: Path) -> None:
    write_table(QM9, {}, results, REPORTED, results / "tables" / "qm9")
    frame = pd.read_csv(results / "tables" / "qm9.csv")
    ours = frame[(frame["method"] == "am") & (frame["metric"] == "mean_negative_energy")]
    assert dict(zip(ours["source"], ours["reported"], strict=True)) == {"fdc": 29.1, "ftfc": 28.4}
    assert ours["value"].to_numpy() == pytest.approx(25.31)
    validity = frame[(frame["method"] == "tfft") & (frame["metric"] == "validity_pct")]
    assert validity["reported"].tolist() == [94.2]
    assert set(frame["solution"]) == {"network"}
    text = (results / "tables" / "qm9.md").read_text()
    for header in (
        "top-0.2 % mean (hartree)",
        "reported (fdc)",
        "reported (ftfc)",
        "top-10 % mean (hartree)",
    ):
        assert header in text


def test_what_holds_is_said_with_its_spread(results: Path) -> None:
    write_table(QM9, {}, results, REPORTED, results / "tables" / "qm9")
    text = (results / "tables" / "qm9.md").read_text()
    best = "the top-0.2 % mean"
    for said in (
        "- am raises the mean of minus energy over pretrained: holds, by 0.3000 ± 0 hartree (3 of 3 seeds).",
        f"- fdc raises {best} over pretrained: holds, by 0.1500 ± 0 hartree (3 of 3 seeds).",
        f"- fdc raises {best} over am: does not hold, by -0.1500 ± 0 hartree (0 of 3 seeds).",
        "- tfft_0.9 raises the top-10 % mean over am: does not hold",
        "- tfft_0.8_fitted raises the top-20 % mean over am_fitted: not decided by these seeds",
        "- fdc reports a mean of minus energy of 15.4 hartree for the pretrained model, where the data",
    ):
        assert said in text
    # Of the two sources only one is far from the data.
    assert (
        "- fdc reports a mean of minus energy of 15.4 hartree for the pretrained model, where the d" in text
    )
    assert "ftfc reports" not in text


def test_what_seeds_do_not_decide_is_said_so() -> None:
    """The sd is 0.05 and the interval of three seeds 0.124, where two standard errors are 0.058."""
    found = [[0.1, 0.2, 0.15], [-0.1, -0.2, -0.15], [0.05, 0.15, 0.1], [0.4], [0.0, 0.0]]
    undecided = "not decided by these seeds"
    said = [decided(np.array(gains)) for gains in found]
    assert said == ["holds", "does not hold", undecided, undecided, undecided]


def test_masses_are_compared_with_the_same_runs_at_every_mass(results: Path) -> None:
    cases = list(load_file(SWEEP).values())
    lines = masses(results, cases)
    assert len(lines) == 5 * 2 + sum(len(case.methods | case.also) for case in cases)
    by = {(line.case, line.method, line.mass): line for line in lines}
    pretrained, am = by["reference", "pretrained", 0.1], by["reference", "am", 0.1]
    assert (pretrained.tail_mean, am.tail_mean) == (34.0, 34.3)
    assert am.gain == pytest.approx(0.3)
    masses_of_pool = (0.5, 0.2, 0.1, 0.05, 0.002)
    assert {key for key in by if key[0] == "pool"} == {
        ("pool", f"tfft_{1 - mass:g}", mass) for mass in masses_of_pool
    }
    assert ("rising", "tfft", 0.002) in by
    own = by["fitted", "tfft_0.8_fitted", 0.2]
    assert own.gain == pytest.approx(0.2)
    assert (own.seconds, own.energies, own.active, own.inactive, own.seeds) == (9.0, 640.0, 0.02, 0.5, 1)
    assert own.passes == 1500
    assert [line.mass for line in lines] == sorted((line.mass for line in lines), reverse=True)
    panel = masses_panel(lines, "Masses")
    assert panel.lines[0][:4] == ["0.5", "pretrained", "30.00", ""]
    write_table(SWEEP, {}, results, REPORTED, results / "tables" / "sweep")
    assert len(pd.read_csv(results / "tables" / "sweep.csv")) == len(lines)


def test_what_several_solves_took_adds_up(results: Path) -> None:
    file = results / "runs" / "molecules_tail_sweep" / "fitted" / "tfft_0.5" / "seed0" / "history.csv"
    history = pd.read_csv(file)
    pd.concat([history.assign(iteration=k) for k in (1, 2, 3)]).to_csv(file, index=False)
    lines = masses(results, list(load_file(SWEEP).values()))
    (own,) = (line for line in lines if (line.case, line.method) == ("fitted", "tfft_0.5"))
    assert (own.passes, own.seconds) == (4500, 27.0)


def test_the_comparison_takes_molecules_beside_the_plane(results: Path) -> None:
    files = [QM9, SWEEP]
    write_comparison(files, {}, results, REPORTED, results / "comparison.csv", results / "by_seed.csv")
    frame = pd.read_csv(results / "comparison.csv")
    judged = frame.dropna(subset=["verdict"])
    assert set(judged["source"]) == {"fdc", "ftfc"}
    assert set(judged["baseline"]) == {"pretrained"}  # all of QM9 is another data set
    assert "pretrained" not in set(judged["method"])


def test_experiments_that_were_not_run_again_are_kept_in_the_comparison(
    results: Path, tmp_path: Path
) -> None:
    files, whole = [QM9, SWEEP], (results / "comparison.csv", results / "by_seed.csv")
    write_comparison(files, {}, results, REPORTED, *whole)
    (results / "runs" / "molecules_tail_sweep").rename(tmp_path / "away")
    again = tmp_path / "comparison.csv", tmp_path / "by_seed.csv"
    write_comparison(files, {}, results, REPORTED, *again, whole[1])
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]
    with pytest.raises(ResultsError, match=r"molecules_tail_sweep/.*no such file"):
        write_comparison(files, {}, results, REPORTED, *again)
    with pytest.raises(ResultsError, match=r"comparison\.csv: not a table of metrics by seed"):
        write_comparison(files, {}, results, REPORTED, *again, whole[0])


def test_a_missing_run_is_named(results: Path) -> None:
    (results / "runs/molecules_qm9/am/seed0/metrics.json").unlink()
    with pytest.raises(ResultsError, match=r"molecules_qm9/am/seed0/metrics\.json: no such file"):
        masses(results, list(load_file(SWEEP).values()))


def test_names_of_energies_in_tables() -> None:
    assert describe("top_0.2pct_negative_energy").header == "top-0.2 % mean (hartree)"
    assert describe("valid_top_10pct_negative_energy").header == "top-10 % mean of the valid (hartree)"
    assert describe("worst_1pct_cost").better == "lower"


# ------------------------------------------------------------------------------------- costs


def write_benchmark(folder: Path, job: str, seconds: float) -> None:
    file = folder / f"{job}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"s\tmax_rss\n{seconds}\t700\n")


def test_costs_of_tfft_include_what_comes_before(tmp_path: Path) -> None:
    (experiment,) = load_file(QM9, {"molecules": {"seeds": 1}}).values()
    for method, seconds in (("am", 100.0), ("fdc", 150.0), ("tfft", 90.0)):
        write_benchmark(tmp_path, f"molecules_finetune/molecules_qm9/{method}/seed0", seconds)
        write_benchmark(tmp_path, f"molecules_sample/molecules_qm9/{method}/seed0", 30.0)
        write_benchmark(tmp_path, f"molecules_evaluate/molecules_qm9/{method}/seed0", 20.0)
    write_benchmark(tmp_path, "molecules_threshold/molecules_qm9/tfft/seed0", 2.0)
    write_benchmark(tmp_path, "molecules_offline/molecules_qm9/seed0", 18.0)
    lines = {line.method: line for line in costs_of(tmp_path, [experiment])}
    assert (lines["am"].relative, lines["fdc"].relative, lines["tfft"].relative) == (1.0, 1.5, 1.1)
    assert (lines["tfft"].batch, lines["tfft"].threshold) == (18.0, 2.0)
    assert np.isnan(lines["am"].threshold)
    assert (lines["am"].assess, lines["am"].memory) == (50.0, 700.0)
    assert lines["data"].updates == 0
    assert lines["fdc"].updates == 20


# ----------------------------------------------------------------------------------- figures


def reward_of(method: str) -> np.ndarray:
    rewards = np.random.default_rng(0).normal(25, 2, 500) + (method == "am")
    rewards[:20] = np.nan
    return rewards


@pytest.mark.slow
def test_histograms_mark_the_tail_of_what_has_an_energy(tmp_path: Path) -> None:
    (experiment,) = load_file(QM9).values()
    runs = runs_of(experiment)
    generated = {m.name: Generated(reward_of(m.name), np.arange(500) % 2 == 0) for m in runs.methods}
    generated["data"] = Generated(np.full(3, np.nan), np.zeros(3, dtype=bool))  # of which none has one
    with figure_style():
        figure = energies_figure(runs, generated, {"fdc": {"am": 39.7}})
        save_figure(figure, tmp_path / "energies.png")
    am = figure.axes[[m.name for m in runs.methods].index("am")]
    best = np.sort(reward_of("am")[20:])[-1]
    assert any(line.get_xdata()[0] == pytest.approx(best) for line in am.lines)
    assert any(line.get_xdata()[0] == pytest.approx(39.7) for line in am.lines)
    assert "reported (fdc) 39.7" in am.get_title(loc="right")


def test_energies_of_a_run_are_pooled_over_seeds(tmp_path: Path) -> None:
    (experiment,) = load_file(QM9, {"molecules": {"seeds": 2}}).values()
    for seed in (0, 1):
        file = tmp_path / f"runs/molecules_qm9/am/seed{seed}/energies.npz"
        write_arrays(file, reward=np.array([20.0 + seed, np.nan]), valid=np.array([True, False]))
    found = load_generated(tmp_path, runs_of(experiment), "am")
    np.testing.assert_array_equal(found.reward, [20, np.nan, 21, np.nan])
    assert found.valid.tolist() == [True, False, True, False]
    write_arrays(tmp_path / "runs/molecules_qm9/am/seed0/energies.npz", reward=np.array([1.0]))
    with pytest.raises(ResultsError, match=r"energies\.npz: no array valid"):
        load_generated(tmp_path, runs_of(experiment), "am")


def test_masses_are_drawn_in_their_order() -> None:
    def line(case: str, mass: float, gain: float) -> MassLine:
        rest: dict[str, Any] = dict.fromkeys(MassLine._fields, 1.0)
        return MassLine(**rest | {"case": case, "method": "pretrained", "mass": mass, "gain": gain})

    lines = [
        line(case, mass, gain) for mass, gain in ((0.5, 0.1), (0.002, 0.3)) for case in ("pool", "reference")
    ]
    figure = masses_figure(lines, "Masses")
    curve = figure.axes[0].lines[0]
    assert list(curve.get_xdata()) == [0, 1]
    assert list(curve.get_ydata()) == [0.1, 0.3]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["0.5", "0.002"]


def test_drawings_show_the_best_and_the_first(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")
    from flowtilt.domains.molecules.chemistry import Invalid, Structure
    from flowtilt.domains.molecules.figures import draw_molecules, shown_molecules
    from flowtilt.domains.molecules.sdf import write_sdf
    from flowtilt.domains.molecules.xtb import Molecule

    water = Molecule(np.array([8, 1, 1]), np.array([[0, 0, 0.1], [0, 0.76, -0.47], [0, -0.76, -0.47]]))
    valid = Structure("O", ((0, 1, 1), (0, 2, 1)), (0, 0, 0))
    invalid = Structure(None, invalid=Invalid.RADICAL)
    properties = [
        {"energy_hartree": -5.0, "smiles": "O"},
        {"failure": "no", "invalid": "unpaired electrons"},
        {"energy_hartree": -6.0, "smiles": "O"},
        {"energy_hartree": -9.0, "invalid": "unpaired electrons"},
    ]
    write_sdf(tmp_path / "m.sdf", [water] * 4, [valid, invalid, valid, invalid], properties)
    shown = shown_molecules(tmp_path / "m.sdf", 2)
    assert [legend for _, legend in shown] == [
        "best 6.00",
        "best 5.00",
        "random 5.00",
        "random no energy, invalid",
    ]
    draw_molecules(tmp_path / "m.png", [("am", shown), ("fdc", shown[:1])])
    image = (tmp_path / "m.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    draw_molecules(tmp_path / "again.png", [("am", shown), ("fdc", shown[:1])])
    assert (tmp_path / "again.png").read_bytes() == image
    with pytest.raises(ResultsError, match=r"none\.sdf: no such file"):
        shown_molecules(tmp_path / "none.sdf")
