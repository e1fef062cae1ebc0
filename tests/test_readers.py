"""Every reader of a file, on files that are not what it wants: one clear error each, with the cure."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from flowtilt.checkpoints import CheckpointError, load_weights
from flowtilt.domains.images import alignment, pipeline, rewards
from flowtilt.domains.images import figures as figures_images
from flowtilt.domains.images import models as image_models
from flowtilt.domains.images import sampling as image_sampling
from flowtilt.domains.molecules import data, flowmol_weights, sdf
from flowtilt.domains.molecules import pretraining as molecule_pretraining
from flowtilt.domains.planar import measured
from flowtilt.domains.planar import solving as truth
from flowtilt.pipeline import files
from flowtilt.pipeline.configuration import ConfigError, read_yaml
from flowtilt.pipeline.files import StageError
from flowtilt.pipeline.report import comparison, costs, measurements, pages
from flowtilt.pipeline.report.measurements import ResultsError
from flowtilt.pipeline.report.provenance import write_provenance
from flowtilt.pipeline.theory import stage as theory
from flowtilt.resuming import Resumption

REFUSALS = (StageError, ResultsError, CheckpointError, ConfigError, data.DataError, sdf.SdfError)
CURE = re.compile("delete|make (it|them|or )|run |restore|save |name |correct|convert|install|must hold")
HISTORY = "update,loss,seconds\n0,1.5,0.1\n1,1.25,0.2\n"
BENCHMARK = "s\tmax_rss\n1.5\t100.0\n"


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def png(size: int = 16) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def weights_of(module: nn.Module) -> bytes:
    return safetensors.torch.save(module.state_dict())


def state(path: Path) -> None:
    slot = Resumption(path.parent, "training", 1.0).slot(path.stem)
    slot.load({"w": torch.zeros(3)})


def page_of(path: Path) -> None:
    pages.write_page(path, "title", path.with_suffix(".html"))


def molecules() -> bytes:
    return npz(
        index=np.array([1], dtype=np.int32),
        smiles=np.array(["C"]),
        counts=np.array([2], dtype=np.int32),
        split=np.zeros(1, dtype=np.uint8),
        types=np.zeros(2, dtype=np.uint8),
        coordinates=np.zeros((2, 3), dtype=np.float32),
    )


SDF = """0
     RDKit          3D

  2  1  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    1.1000    0.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  3  0
M  CHG  2   1  -1   2   1
M  END
>  <method>  (1)
GFN1-xTB

$$$$
"""


class Reader(NamedTuple):
    """How a file is read, its name, and what a good one holds; a truncated one may still be good text."""

    read: Callable[[Path], Any]
    name: str
    good: bytes
    cut: bool = True
    empty: bool = True


def in_folder(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path.parent)


def scheduler(path: Path) -> Any:
    return pipeline._scheduler_settings(path.parents[1])


LINEAR = nn.Linear(2, 3)
RECORD = {"commit": {"hash": None}, "config_hash": "a", "versions": {}, "machine": {}, "stages": {}}
OTHER_JSON = ("[]", "{}", "null", "3", '"text"', '{"rows": []}', '{"width": NaN}')
READERS = {
    "arrays of a stage": Reader(lambda p: files.read_arrays(p, "x"), "samples.npz", npz(x=np.zeros((9, 2)))),
    "history of a stage": Reader(
        lambda p: files.read_columns(p, "loss"), "history.csv", HISTORY.encode(), False
    ),
    "schedule": Reader(
        files.read_schedule, "threshold.json", b'{"schedule": [{"mass": 0.5, "threshold": 1.0}]}'
    ),
    "threshold": Reader(
        files.read_threshold, "threshold.json", b'{"threshold": 1.0, "offline_active_share": 0.1}'
    ),
    "resolution of a stage": Reader(truth._read_resolution, "resolution.json", b'{"width": 0.25}'),
    "theory": Reader(
        lambda p: theory.report(p, p.with_name("t"), p.with_name("t.png")), "theory.json", b'{"kind": "x"}'
    ),
    "model": Reader(
        image_models.read_model, "model.json", b'{"pipeline": {"path": "a"}, "alignment": {"path": "b"}}'
    ),
    "checks": Reader(molecule_pretraining._read_checks, "checks.json", b'[{"updates": 3}]'),
    "images": Reader(in_folder(image_sampling.read_images), "prompt000_0000.png", png()),
    "image": Reader(
        in_folder(lambda folder: figures_images.read_image(folder, 0, 0)), "prompt000_0000.png", png()
    ),
    "metrics by seed": Reader(
        measurements.read_by_seed,
        "by_seed.csv",
        b"experiment,method,metric,seed,value\na,am,kl,0,1.5\n",
        False,
    ),
    "metrics": Reader(measurements.read_metrics, "metrics.json", b'{"rows": {"am": {"kl": 1.0}}}'),
    "table": Reader(lambda p: measurements.read_csv(p, ["a", "b"]), "table.csv", b"a,b\n1,2\n", False),
    "reported values": Reader(
        comparison.read_reported,
        "reported.csv",
        (",".join(comparison.REPORTED_COLUMNS) + "\n").encode(),
        False,
    ),
    "history": Reader(
        lambda p: measurements.read_history(p, ["loss"]), "history.csv", HISTORY.encode(), False
    ),
    "arrays": Reader(measurements.read_arrays, "distributions.npz", npz(axis=np.zeros(9))),
    "resolution": Reader(measured.read_resolution, "resolution.json", b'{"width": 0.25}'),
    "benchmark": Reader(costs.read_benchmark, "seed0.tsv", BENCHMARK.encode(), False),
    "costs": Reader(
        costs.read_costs,
        "costs.csv",
        (",".join(dict.fromkeys(["part", *costs.Cost._fields, *costs.TOTAL_COLUMNS])) + "\n").encode(),
        False,
    ),
    "page of a provenance": Reader(page_of, "provenance.json", json.dumps(RECORD).encode()),
    "earlier provenance": Reader(
        lambda p: write_provenance("a", p.parent / "none", p.with_name("new.json"), p),
        "earlier.json",
        json.dumps(RECORD).encode(),
    ),
    "weights": Reader(lambda p: load_weights(nn.Linear(2, 3), p), "model.safetensors", weights_of(LINEAR)),
    "state": Reader(state, "training.safetensors", weights_of(LINEAR)),
    "FlowMol's weights": Reader(
        lambda p: flowmol_weights._described(p),
        "flowmol.safetensors",
        safetensors.torch.save({"description": torch.zeros(2), "size_weights": torch.zeros(2)}),
    ),
    "ImageReward's weights": Reader(rewards._read, "reward.safetensors", weights_of(LINEAR)),
    "scheduler": Reader(
        scheduler, "pipe/scheduler/scheduler_config.json", b'{"_class_name": "DDIMScheduler"}'
    ),
    "settings of a CLIP": Reader(
        in_folder(alignment._check_folder), "clip/open_clip_config.json", b'{"model_cfg": {"text_cfg": {}}}'
    ),
    "QM9": Reader(data.load, "molecules.npz", molecules()),
    "QM9's records": Reader(
        lambda p: list(data.read_records(p)),
        "qm9.csv",
        (",".join(data.COLUMNS) + "\n1,C,['H'],[[0.0 0.0 0.0]]\n").encode(),
        False,
        False,
    ),
    "SDF": Reader(sdf.read_sdf, "samples.sdf", SDF.encode(), True, False),
    "YAML": Reader(read_yaml, "e.yaml", b"name: e\n", False),
}
ABSENT = {"checks", "resolution", "state"}
"""Readers of what need not be there."""


def written(reader: Reader, content: bytes, folder: Path) -> Path:
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def damaged(name: str) -> dict[str, bytes]:
    """Contents that are not what a reader wants, by what is wrong with them."""
    reader = READERS[name]
    binary = reader.name.endswith((".npz", ".png", ".safetensors"))
    found = {"bytes that are nothing": bytes([0, 255, 254, 7] * 40)}
    if reader.empty:
        found["empty"] = b""
    if reader.cut:
        found |= {f"cut at {share} %": reader.good[: len(reader.good) * share // 100] for share in (50, 90)}
    if not binary:
        found["another encoding"] = reader.good + "ü".encode("iso-8859-1")
    if reader.name.endswith(".json"):
        found |= {text: text.encode() for text in OTHER_JSON}
        if name == "checks":
            del found["[]"]  # of a training before its first check
    if reader.name.endswith((".csv", ".tsv")):
        found |= {"other columns": b"p,q\n1,2\n", "quotes that do not end": b'"a,b\n1,2\n'}
    if reader.name.endswith(".npz"):
        middle = len(reader.good) // 3
        flipped = bytes([*reader.good[:middle], reader.good[middle] ^ 255, *reader.good[middle + 1 :]])
        found |= {"flipped": flipped, "pickles": npz(x=np.array([{}], dtype=object))}
        if name != "arrays":
            found["other names"] = npz(other=np.zeros(3))
        if name == "arrays of a stage":
            found["text"] = npz(x=np.array(["a"]))
    if reader.name.endswith(".safetensors") and name != "ImageReward's weights":
        found["other names"] = safetensors.torch.save({"other": torch.zeros(3)})
    if reader.name.endswith(".png"):
        body = reader.good
        found["broken"] = body[:40] + bytes(len(body) - 40)
    return found


CASES = [(name, what) for name in READERS for what in damaged(name)]


@pytest.mark.parametrize(("name", "what"), CASES, ids=[f"{name}-{what}" for name, what in CASES])
def test_what_is_not_the_file_is_refused_with_its_name_and_the_cure(
    name: str, what: str, tmp_path: Path
) -> None:
    reader = READERS[name]
    path = written(reader, damaged(name)[what], tmp_path)
    with pytest.raises(REFUSALS) as raised:
        reader.read(path)
    message = str(raised.value)
    assert str(path) in message or str(path.parent) in message
    assert CURE.search(message), message
    assert len(message) < 700, message


@pytest.mark.parametrize("name", [name for name in READERS if name not in ABSENT])
def test_what_is_not_there_is_refused_with_its_name_and_the_cure(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = written(reader, b"", tmp_path)
    path.unlink()
    with pytest.raises(REFUSALS) as raised:
        reader.read(path)
    assert str(path) in str(raised.value) or str(path.parent) in str(raised.value)


GOOD = [name for name in READERS if name not in {"theory", "state", "settings of a CLIP", "QM9's records"}]


@pytest.mark.parametrize("name", GOOD)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    READERS[name].read(written(READERS[name], READERS[name].good, tmp_path))
