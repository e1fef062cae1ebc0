"""The stage that solves TFFT's dual, on made-up offline batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from flowtilt import thresholds
from flowtilt.pipeline.sections import TailSpec
from flowtilt.pipeline.thresholds import threshold


def solved(folder: Path, rewards: np.ndarray, contexts: np.ndarray, tail: TailSpec) -> dict[str, float]:
    """What the stage writes of a batch."""
    folder.mkdir(exist_ok=True)
    np.savez(folder / "offline.npz", reward=rewards.astype(np.float32), context=contexts)
    experiment = SimpleNamespace(tail_of=lambda _: tail, masses_of=lambda _: [], threshold_of=lambda _: None)
    files = {"threshold": folder / "threshold.json"}
    read = {"offline": folder / "offline.npz"}
    threshold(SimpleNamespace(experiment=experiment, method="tfft", read=read.get, outputs=files))  # type: ignore[arg-type]
    found: dict[str, float] = json.loads(files["threshold"].read_text())
    return found


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Three in four samples of a context with low rewards, the others of one with high and wider ones."""
    generator = np.random.default_rng(7)
    contexts = np.repeat([3, 8], [900, 300])
    rewards = np.where(contexts == 3, generator.normal(0.0, 1.0, 1200), generator.normal(2.0, 1.5, 1200))
    return rewards.astype(np.float32).astype(np.float64), contexts


def test_every_context_has_a_normaliser_of_its_own(tmp_path: Path) -> None:
    """Against ``t + alpha sum_c pi_c log E[exp((r - t)_+ / (alpha m)) | c]``, minimised by scipy."""
    rewards, contexts = batch()
    alpha, mass = 0.7, 0.2

    def dual(t: float) -> float:
        terms = np.exp(np.maximum(rewards - t, 0) / (alpha * mass))
        return t + alpha * sum(
            share * np.log(terms[contexts == c].mean()) for c, share in ((3, 0.75), (8, 0.25))
        )

    expected = minimize_scalar(dual, bounds=(-2.0, 9.0), method="bounded", options={"xatol": 1e-9}).x
    found = solved(tmp_path, rewards, contexts, TailSpec("upper", mass, alpha))
    assert found["threshold"] == pytest.approx(expected, abs=1e-5)
    assert found["offline_pooled"] == 0
    # Normalised over both together, mass would go to the better context, and the threshold up.
    pooled = thresholds.threshold(rewards, alpha, mass, "upper")
    assert pooled > found["threshold"] + 0.1


def test_failed_samples_do_not_make_their_context_rarer(tmp_path: Path) -> None:
    """Every sample of the better context is there twice, and one of the two fails: nothing changes."""
    rewards, contexts = batch()
    better = contexts == 8
    twice = np.append(rewards, rewards[better]), np.append(contexts, contexts[better])
    tail = TailSpec("upper", 0.2, 0.7)
    whole = solved(tmp_path / "whole", *twice, tail)
    twice[0][len(rewards) :] = np.nan
    half = solved(tmp_path / "half", *twice, tail)
    assert (half["offline_samples"], half["offline_failed"]) == (1200, 300)
    assert half["threshold"] == pytest.approx(whole["threshold"], abs=1e-9)
    # As if they had not been drawn at all, the other context would count for more.
    assert solved(tmp_path / "fewer", rewards, contexts, tail)["threshold"] < half["threshold"] - 0.1


def test_contexts_of_few_samples_are_taken_together_and_counted(tmp_path: Path) -> None:
    rewards, _ = batch()
    few = np.repeat(np.arange(240), 5)
    found = solved(tmp_path, rewards, few, TailSpec("lower", 0.2, 0.7))
    assert found["offline_pooled"] == 1200
    pairs = thresholds.threshold(rewards, 0.7, 0.2, "lower", contexts=few // 2)
    assert found["threshold"] == pairs
