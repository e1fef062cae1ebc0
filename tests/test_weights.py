"""Weights of another type, or that are no finite numbers, are refused as they are loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from flowtilt.checkpoints import CheckpointError, check_loaded, load_weights, save_weights
from flowtilt.domains.images.alignment import load_alignment
from flowtilt.domains.images.pipeline import load_text_to_image
from flowtilt.resuming import Resumption

ROOT = Path(__file__).parents[1]
PIPELINE, CLIP = ROOT / "resources/images/bridges", ROOT / "resources/images/bridges_clip"


def changed(file: Path, change: torch.dtype | float) -> str:
    """Cast the first matrix of a file, or put a number into it; the matrix's name."""
    tensors = safetensors.torch.load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensor = tensors[name].clone()
    if isinstance(change, torch.dtype):
        tensors[name] = tensor.to(change)
    else:
        tensor[0, 0] = change
        tensors[name] = tensor
    safetensors.torch.save_file(tensors, file)
    return name


BAD = [torch.int32, torch.float16, torch.float64, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_own_weights_have_the_networks_type_and_are_finite(
    change: torch.dtype | float, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), file)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    load_weights(model, file)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = changed(file, change)
    what = f"type {change}.*torch.float32" if isinstance(change, torch.dtype) else "not finite"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} .*{what}.*delete"):
        load_weights(model, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", [torch.float16, math.nan], ids=str)
def test_states_have_the_networks_type_and_are_finite(change: torch.dtype | float, tmp_path: Path) -> None:
    slot = Resumption(tmp_path, "training", 1.0).slot("solve")

    def tensors() -> dict[str, Tensor]:
        return {"model.w": torch.ones(2, 2), "updates.0": torch.ones(1)}

    slot.save(tensors(), [{"update": 0, "loss": math.nan}])
    assert slot.load(tensors()) is not None
    bad = tensors()
    bad["model.w"] = bad["model.w"].to(change) if isinstance(change, torch.dtype) else bad["model.w"] * change
    slot.save(bad, [{"update": 0, "loss": 1.0}])
    with pytest.raises(CheckpointError, match=r"solve\.safetensors: .*delete"):
        slot.load(tensors())


@pytest.mark.parametrize("change", [torch.int32, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_parts_of_a_pipeline_are_floating_and_finite(
    part: str, change: torch.dtype | float, tmp_path: Path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, folder)
    (file,) = (folder / part).glob("*.safetensors")
    name = changed(file, change)
    what = "type I32" if isinstance(change, torch.dtype) else "not finite"
    with pytest.raises(CheckpointError, match=rf"{part}.*{what}.*restore the folder") as raised:
        load_text_to_image(folder, ["a bridge"])
    assert name.rpartition(".")[2] in str(raised.value)


@pytest.mark.parametrize("change", [torch.int32, math.nan], ids=str)
def test_a_clip_is_floating_and_finite(change: torch.dtype | float, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    changed(folder / "open_clip_model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors: .*(I32|not finite).*again"):
        load_alignment(str(folder))


def test_foreign_weights_may_be_half_and_have_positions(tmp_path: Path) -> None:
    load_text_to_image(PIPELINE, ["a bridge"])  # stored in 16 bits
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    file = tmp_path / "model.safetensors"
    half = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    assert not half["1.num_batches_tracked"].is_floating_point()
    safetensors.torch.save_file(half, file)
    check_loaded(network, [file], "restore it")
