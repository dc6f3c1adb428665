"""The main job as a GPU runs it: mixed precision, features kept there; beside the same job on the CPU.

All but the names of the device runs on a CPU as well, so that this code is tested where there is no GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regraft
from regraft.anatomy.heads import find_heads
from regraft.errors import Interrupted
from training.by_hand import DEVICES, built, loop_by_hand, read_photos, write_photos
from training.by_hand import STEPS as STEPS_OF_LOOP
from training.factories import Lines, StopsAt, assert_same

ARCHITECTURES = ["resnet50", "vit_b_16", "mobilenet_v3_small", "convnext_tiny"]


def on(device: str) -> str:
    """Return the precision that a run on the GPU takes by itself."""
    return "auto" if device == "cuda" else "bf16"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 30, measured=20)


@pytest.mark.parametrize("device", DEVICES)
def test_fit_on_a_gpu_ends_with_features_on_the_device(device: str, photos: Path) -> None:
    lines = Lines()
    result = regraft.fit(built("cnn, head"), photos, progress=lines, device=device, precision=on(device), epochs=5)
    assert result.computed_once is not None
    assert result.computed_once.where == ("in memory" if device == "cpu" else "on cuda")
    assert "head       solved" in lines
    reference = regraft.fit(built("cnn, head"), photos, device="cpu", precision="fp32", epochs=5)
    assert result.validation.accuracy == pytest.approx(reference.validation.accuracy, abs=2 / 40)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_fit_on_a_gpu_learns_from_features_that_stay_off_the_device(
    where: str, device: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.training.features import extract

    monkeypatch.setattr(extract, "MEMORY_SHARE", 0.0)  # of the GPU's
    if where == "disk":
        monkeypatch.setattr(extract, "MEMORY_BYTES", 0)
    expected = loop_by_hand(built("cnn, head"), read_photos(photos, "train"), read_photos(photos, "val"))
    options = {**STEPS_OF_LOOP, "device": device, "precision": on(device)}
    result = regraft.fit(built("cnn, head"), photos, **options)
    assert result.computed_once is not None
    assert result.computed_once.where == ("in memory" if where == "memory" else "on disk")
    found = [(record.train_loss, record.validation.loss) for record in result.history]
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 0.02
    lines = Lines()
    regraft.fit(built("cnn, head"), photos, progress=lines, device=device, precision=on(device), epochs=1, head="steps")
    assert "chosen     learning rate" in lines  # also by what is moved batch by batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["cnn, half", "vit, half"])
def test_fit_on_a_gpu_scales_float16_and_is_the_loop_by_hand(name: str, device: str, photos: Path) -> None:
    expected = loop_by_hand(built(name), read_photos(photos, "train"), read_photos(photos, "val"))
    result = regraft.fit(built(name), photos, **{**STEPS_OF_LOOP, "device": device, "precision": "fp16"})
    found = [(record.train_loss, record.validation.loss) for record in result.history]
    assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 5e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fit_on_a_gpu_goes_on_with_a_stopped_run(precision: str, device: str, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 20, "lr": 0.01, "precision": precision, "device": device}
    whole = regraft.fit(built("cnn, half"), photos, out=str(tmp_path / "whole"), **options)
    with pytest.raises(Interrupted):
        regraft.fit(built("cnn, half"), photos, out=str(tmp_path / "run"), progress=StopsAt(2, 1), **options)
    result = regraft.fit(built("cnn, half"), photos, out=str(tmp_path / "run"), resume=True, **options)
    if device == "cpu":
        assert_same(result, whole)
    else:  # whose kernels may add in another order
        assert result.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fit_on_a_gpu_takes_weights_in_another_type(dtype: torch.dtype, device: str, photos: Path) -> None:
    result = regraft.fit(built("vit, head", dtype), photos, device=device, epochs=3)
    evaluated = regraft.evaluate(result.model, photos / "val", device=device)
    assert evaluated.accuracy == pytest.approx(result.validation.accuracy, abs=2 / 40)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")  # of constructors
def test_fit_on_a_gpu_trains_the_head_of_an_architecture(name: str, shared: Path) -> None:
    hymenoptera, results = shared / "data" / "hymenoptera", []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        model = regraft.create_model(name, weights="none", num_classes=2)
        regraft.freeze(model)
        regraft.unfreeze(model, *find_heads(model))
        results.append(regraft.fit(model, hymenoptera, device=device))
    ours, reference = results
    assert ours.computed_once is not None
    assert ours.plan.device.startswith("cuda")
    assert ours.validation.count == 153
    # Random features tell the two apart so little that rounding moves some photos over the border.
    assert abs(ours.validation.accuracy - reference.validation.accuracy) * 153 <= 12
    assert abs(ours.validation.loss - reference.validation.loss) < 0.1


def lite0(shared: Path) -> nn.Module:
    model = regraft.create_model("timm/tf_efficientnet_lite0", weights="none")
    regraft.load_weights(model, shared / "weights" / "efficientnet-lite0-57934424.pth", accept="ambiguous")
    model = regraft.replace_head(model, 2)
    regraft.freeze(model)
    regraft.unfreeze(model, *find_heads(model))
    return model


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
            ],
        ),
    ],
)
def test_fit_on_a_gpu_trains_a_head_on_real_weights(device: str, shared: Path) -> None:
    accuracies = []
    for where, precision in ((device, on(device)), ("cpu", "fp32")):
        torch.manual_seed(0)
        # A CPU computes bfloat16 slowly: half the views, and a quarter of the pixels, take seconds instead of minutes.
        options = {"augment": "none", "image_size": 144} if device == "cpu" else {}
        data = shared / "data" / "hymenoptera"
        result = regraft.fit(lite0(shared), data, device=where, precision=precision, **options)
        assert result.validation.accuracy is not None
        accuracies.append(result.validation.accuracy)
    assert min(accuracies) > 0.9  # .948 by logistic regression on the same features
    assert abs(accuracies[0] - accuracies[1]) * 153 <= 2.5
