"""Training of weights in float64, bfloat16 or several types is training in float32 up to rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import regraft
import tiny
from regraft.errors import ModelError
from training.by_hand import (
    BUILT,
    HALF_SIZE,
    STEPS,
    assert_near,
    built,
    cnn,
    loop_by_hand,
    read_photos,
)
from training.factories import Lines

OWN = {torch.float64: 1e-5, torch.bfloat16: 0.03}


@pytest.mark.parametrize("dtype", OWN, ids=str)
@pytest.mark.parametrize("name", BUILT)
def test_fit_of_weights_in_another_type_is_the_loop_by_hand(
    name: str, dtype: torch.dtype, few: Path, tmp_path: Path
) -> None:
    expected = loop_by_hand(built(name), read_photos(few, "train"), read_photos(few, "val"))
    lines = Lines()
    result = regraft.fit(built(name, dtype), few, device="cpu", progress=lines, out=str(tmp_path / "run"), **STEPS)
    assert "computed once" in lines
    assert_near(result, expected, OWN[dtype])
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert result.plan.device == f"cpu in {str(dtype).removeprefix('torch.')}, as its weights are"
    images, targets = read_photos(few, "val")
    with torch.no_grad():
        scores = result.model(images.to(dtype)).float()
    assert (
        regraft.evaluate(result.model, few / "val", device="cpu").accuracy
        == (scores.argmax(1) == targets).float().mean()
    )
    labels = [found.label for found in regraft.predict(result.model, images, device="cpu")]
    assert labels == [f"class{index:03}" for index in scores.argmax(1).tolist()]


@pytest.mark.parametrize("dtype", OWN, ids=str)
@pytest.mark.parametrize("data", ["images", "words"])
def test_fit_of_weights_in_another_type_on_datasets(data: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    targets = torch.arange(24) % 2
    if data == "images":
        inputs = torch.randn(24, 3, tiny.SIDE, tiny.SIDE) + targets[:, None, None, None]
        model = cnn()
    else:
        inputs = torch.randint(9, (24, 5)) + 9 * targets[:, None]
        model = nn.Sequential(nn.Embedding(18, 4), nn.Flatten(), nn.Linear(20, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = loop_by_hand(model, (inputs, targets), (inputs, targets))
    model.load_state_dict(state)
    pair = TensorDataset(inputs, targets)
    assert_near(regraft.fit(model.to(dtype), (pair, pair), device="cpu", **STEPS), expected, OWN[dtype])
    assert regraft.evaluate(model, pair, device="cpu").count == 24


@pytest.mark.parametrize("dtype", OWN, ids=str)
def test_fit_of_weights_in_another_type_trains_a_head(dtype: torch.dtype, many: Path) -> None:
    lines = Lines()
    result = regraft.fit(built("cnn, head", dtype), many, device="cpu", progress=lines, epochs=3, head="steps")
    assert "chosen     learning rate" in lines
    reference = regraft.fit(built("cnn, head"), many, device="cpu", epochs=3)
    solved = regraft.fit(built("cnn, head", dtype), many, device="cpu")
    assert solved.validation.accuracy == pytest.approx(reference.validation.accuracy, abs=0.04)
    assert result.validation.accuracy == pytest.approx(reference.validation.accuracy, abs=0.04)
    state = result.model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_fit_takes_inputs_in_float64_for_weights_in_float32() -> None:
    pair = TensorDataset(torch.randn(20, 3, tiny.SIDE, tiny.SIDE, dtype=torch.float64), torch.arange(20) % 2)
    result = regraft.fit(cnn(), (pair, pair), device="cpu", **STEPS)
    assert regraft.evaluate(result.model, pair, device="cpu").accuracy == result.history[-1].validation.accuracy


class InParts(nn.Module):
    """A front in 16 bits and a head in float32, which casts between them, or leaves that to autocast."""

    preprocessing = HALF_SIZE

    def __init__(self, dtype: torch.dtype, *, casts: bool) -> None:
        super().__init__()
        self.front, self.head, self.casts = nn.Conv2d(3, 6, 3, dtype=dtype), nn.Linear(6, 2), casts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.front(x)).mean((2, 3))
        return self.head(x.float() if self.casts else x)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fit_of_a_frozen_front_in_16_bits_and_a_head_in_float32(dtype: torch.dtype, precision: str, many: Path) -> None:
    model, lines = InParts(dtype, casts=True), Lines()
    regraft.freeze(model, "front")
    before = model.front.weight.clone()
    result = regraft.fit(model, many, device="cpu", precision=precision, progress=lines, epochs=2)
    assert "computed once" in lines
    assert "chosen     learning rate" in lines
    assert torch.equal(before, model.front.weight)
    assert regraft.evaluate(result.model, many / "val", device="cpu").accuracy == result.validation.accuracy


def test_fit_of_types_that_meet_under_autocast_alone(few: Path, tmp_path: Path) -> None:
    model, lines = InParts(torch.bfloat16, casts=False), Lines()
    regraft.freeze(model, "front")
    with pytest.raises(ModelError, match=r"fails on a batch of shape .* \(float32; weights in bfloat16 and float32\)"):
        regraft.fit(model, few, device="cpu", precision="fp32", out=str(tmp_path / "run"), **STEPS)
    assert not (tmp_path / "run").exists()
    result = regraft.fit(model, few, device="cpu", precision="bf16", progress=lines, **STEPS)
    assert "every epoch runs the full network: it, outside of autocast, fails" in lines
    with pytest.raises(ModelError, match=r"InParts \(weights in bfloat16 and float32\) fails on these inputs"):
        regraft.evaluate(result.model, few / "val", device="cpu")


@pytest.mark.parametrize("frozen", [(), ("conv*", "bn*")], ids=["all", "head"])
@pytest.mark.parametrize("options", [{}, {"unfreeze": "head:1,all:1"}, {"precision": "fp16"}], ids=str)
def test_fit_refuses_to_train_weights_in_float16(
    options: dict[str, Any], frozen: tuple[str, ...], few: Path, tmp_path: Path
) -> None:
    model = cnn(*frozen).half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"'\w+.weight' of \w+ cannot be trained in float16, .* model.float\(\)"):
        regraft.fit(model, few, out=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fit_starts_from_scikit_learns_ridge_in_each_type_of_weights(dtype: torch.dtype, many: Path) -> None:
    options = {"head": "ridge", "lr": 1e-12, "weight_decay": 0.0, "epochs": 1, "augment": "none"}
    result = regraft.fit(built("cnn, head", dtype), many, device="cpu", **options)
    model, features = built("cnn, head", torch.float64), []
    model.get_submodule("fc").register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    images, targets = read_photos(many, "train")
    model.eval()(images.double())
    spread = features[0].std(0)
    spread[spread <= 1e-9 * spread.max()] = 1.0
    scaled = ((features[0] - features[0].mean(0)) / spread).numpy()
    signs = F.one_hot(targets).double().numpy()
    found = result.model.get_parameter("fc.weight").detach().double() * spread
    likeness = []
    for penalty in np.logspace(-3, 3, 13) * torch.linalg.svdvals(torch.from_numpy(scaled)).square().mean().item():
        oracle = torch.from_numpy(Ridge(penalty).fit(scaled, signs).coef_)
        likeness.append(F.cosine_similarity(oracle.flatten(), found.flatten(), dim=0).item())
    assert max(likeness) > 1 - 1e-6  # of one of the penalties, up to how far scores are stretched
