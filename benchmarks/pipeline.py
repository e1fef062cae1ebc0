"""How much faster independent runs go on two cores than on one, and whether they give the same numbers.

Fine-tunes the risk-averse experiment by am, fdc and tfft for four seeds, at full size, by Snakemake: first on
one core, then on two. What stands before them (pretraining, offline batches) is made once and not timed.

Run:  python benchmarks/pipeline.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS, SEEDS = ("fdc", "tfft", "am"), (0, 1, 2, 3)
RUN = "results/runs/risk_averse_2d"


def snakemake(folder: Path, cores: int, targets: list[str]) -> float:
    """Seconds that Snakemake takes for some targets."""
    started = time.perf_counter()
    profile = ["--workflow-profile", "workflow/profiles/default", "--cores", str(cores), "--quiet", "all"]
    config = ["--config", "experiments=[risk_averse_2d]", "theory=[]"]
    command = [sys.executable, "-m", "snakemake", *profile, *config, "--", *targets]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Snakemake failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started


def weights(folder: Path) -> dict[str, bytes]:
    """Contents of the fine-tuned models, by run."""
    files = [
        folder / RUN / method / f"seed{seed}" / "model.safetensors" for method in METHODS for seed in SEEDS
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        for part in ("config", "envs", "workflow", "resources", "src"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "Snakefile", folder)
        before = [f"{RUN}/tfft/seed{seed}/threshold.json" for seed in SEEDS]
        snakemake(folder, 2, before)
        targets = [f"{RUN}/{method}/seed{seed}/model.safetensors" for method in METHODS for seed in SEEDS]
        seconds, found = {}, {}
        for cores in (1, 2):
            for method in METHODS:
                shutil.rmtree(folder / RUN / method, ignore_errors=True)
            snakemake(folder, 2, before)
            seconds[cores] = snakemake(folder, cores, targets)
            found[cores] = weights(folder)
    same = "the same bytes" if found[1] == found[2] else "DIFFERENT weights"
    print(f"{len(targets)} fine-tunings: {seconds[1]:.1f} s on one core, {seconds[2]:.1f} s on two: ", end="")
    print(f"{seconds[1] / seconds[2]:.2f} times as fast, {same}")


if __name__ == "__main__":
    main()
