"""Training in fewer bits, and of weights in other types, is training in float32 up to rounding.

The oracles are loops written by hand on plain forwards, and scikit-learn on what a forward hook sees.
"""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.ops import StochasticDepth

import regraft
import tiny
from frontier.architectures import NETS, PATTERNS, make
from regraft.errors import ConfigError, LossError
from regraft.training import loop
from regraft.training.steps.compute import choose_compute
from training.by_hand import (
    BUILT,
    DEVICES,
    HALF_SIZE,
    STEPS,
    assert_near,
    built,
    cnn,
    loop_by_hand,
    read_photos,
    write_photos,
)
from training.factories import Lines

PRECISIONS = {"fp32": 1e-4, "bf16": 0.02, "fp16": 3e-3}  # how far a mean loss may be from that of the loop in float32
KEPT = {"full": 0.0, "bf16": 0.02, "fp16": 3e-3, "int8": 0.02}


@pytest.fixture(scope="module")
def separable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make photos whose colours even the features of untrained networks tell apart, almost without fail."""
    root, drawn = tmp_path_factory.mktemp("separable"), np.random.default_rng(5)
    for part, count in (("train", 48), ("val", 25)):
        for label, colour in (("reddish", (190, 120, 50)), ("bluish", (50, 120, 190))):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + drawn.normal(0, 15, 3) + drawn.normal(0, 40, (tiny.SIDE, tiny.SIDE, 3))
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BUILT)
def test_fit_on_cached_features_is_the_loop_by_hand(name: str, precision: str, device: str, few: Path) -> None:
    expected = loop_by_hand(built(name), read_photos(few, "train"), read_photos(few, "val"))
    for kept, rounding in KEPT.items():
        lines = Lines()
        options = {**STEPS, "precision": precision, "cache_precision": kept, "device": device}
        result = regraft.fit(built(name), few, progress=lines, **options)
        assert "computed once" in lines
        assert_near(result, expected, PRECISIONS[precision] + rounding)
        if kept in ("bf16", "fp16"):
            continue
        again = Lines()
        found = regraft.fit(built(name), few, progress=again, **options)
        assert "found in the cache" in again
        assert [record.train_loss for record in found.history] == pytest.approx(
            [record.train_loss for record in result.history], abs=0 if device == "cpu" else 1e-4
        )


SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal  # 6e-5, below which float16 has fewer and fewer bits


def largest_feature(model: nn.Module, photos: Path) -> float:
    """Return the largest number that the last linear layer is given; untrained networks may give next to nothing."""
    inputs: list[torch.Tensor] = []
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model.eval()(read_photos(photos, "train")[0])
    return float(inputs[0].abs().max())


# Not half of them in float16: activations of untrained networks are too small for it, whoever computes them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "precision"), [*(("head", precision) for precision in PRECISIONS), ("half", "fp32"), ("half", "bf16")]
)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore")  # of constructors
def test_fit_on_cached_features_of_an_architecture_is_the_loop_by_hand(
    name: str, pattern: str, precision: str, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path, 6, side=NETS[name], measured=3)

    def model() -> nn.Module:
        torch.manual_seed(0)
        network = regraft.replace_head(make(name), 2)
        network.preprocessing = {**HALF_SIZE, "size": NETS[name], "resize": NETS[name]}  # pyright: ignore
        for layer in network.modules():
            if isinstance(layer, (nn.Dropout, StochasticDepth)):
                layer.p = 0.0
        PATTERNS[pattern](network)
        return network

    # Where batch norms of an untrained network learn from a few pixels, rounding of 1e-7 moves the next loss by 0.02:
    # of those networks only the first step is compared, in the network's own order of operations.
    is_head = pattern == "head"
    growth = 1 if is_head else 3  # of rounding, in those batch norms
    options = {**STEPS, "precision": precision, "device": "cpu", "lr": 0.001, "fast": is_head}
    options["epochs"] = STEPS["epochs"] if is_head else 1
    expected = loop_by_hand(model(), read_photos(photos, "train"), read_photos(photos, "val"), lr=0.001)
    for kept, rounding in KEPT.items():
        if not is_head and (kept not in ("full", "int8") or (precision != "fp32" and kept != "full")):
            continue  # all combinations are tried with a head alone, and with half of two small networks
        lines = Lines()
        options["cache_precision"] = kept
        result = regraft.fit(model(), photos, progress=lines, **options)
        has_room = "fp16 has no room for" not in lines
        assert ("computed once" in lines) == has_room
        assert has_room or (kept == "fp16" and largest_feature(model(), photos) < SMALLEST_NORMAL)
        assert_near(result, expected[: options["epochs"]], growth * (PRECISIONS[precision] + rounding))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["cnn, head", "vit, head"])
@pytest.mark.parametrize("head", ["solved", "steps"])
def test_fit_in_each_precision_does_as_well_as_logistic_regression(
    head: str, name: str, precision: str, device: str, separable: Path
) -> None:
    model, lines = built(name), Lines()
    features: list[torch.Tensor] = []
    handle = model.get_submodule("fc" if name == "cnn, head" else "head").register_forward_pre_hook(
        lambda _, given: features.append(given[0].detach())
    )
    (images, targets), (measured, expected) = (read_photos(separable, part) for part in ("train", "val"))
    with torch.no_grad():
        model.eval()(images)
        model(measured)
    handle.remove()
    oracle = LogisticRegression(max_iter=2000).fit(features[0].numpy(), targets.numpy())
    accuracy = oracle.score(features[1].numpy(), expected.numpy())
    assert accuracy >= 0.9  # or nothing could be told from the comparison: chance is 0.5
    result = regraft.fit(model, separable, progress=lines, precision=precision, device=device, epochs=5, head=head)
    assert ("chosen     learning rate" in lines) == (
        head == "steps"
    )  # heads were trained side by side, whatever the precision
    assert result.validation.accuracy is not None
    assert result.validation.accuracy >= accuracy - 2 / len(expected)
    evaluated = regraft.evaluate(result.model, separable / "val", device=device)
    assert evaluated.accuracy == pytest.approx(result.validation.accuracy, abs=2 / len(expected))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_starts_from_the_same_ridge_regression_in_each_precision(precision: str, many: Path) -> None:
    weights = []
    for one in ("fp32", precision):
        options = {"precision": one, "head": "ridge", "lr": 1e-9, "epochs": 1, "weight_decay": 0.0}
        weights.append(regraft.fit(built("cnn, head"), many, device="cpu", **options).model.get_parameter("fc.weight"))
    distance = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert distance < {"fp32": 1e-6, "bf16": 0.2, "fp16": 0.02}[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kept", ["full", "int8"])
def test_fit_that_unfreezes_is_the_loop_by_hand(precision: str, kept: str, few: Path) -> None:
    torch.manual_seed(1)
    model, (images, targets), measured = cnn(), read_photos(few, "train"), read_photos(few, "val")
    expected, stages = [], (("fc",), ("fc", "conv2"), ("fc", "conv2", "bn2", "conv1", "bn1"))
    for stage in stages:
        for name, layer in model.named_children():
            layer.requires_grad_(name in stage)
        layers = [layer for name, layer in model.named_children() if name not in stage]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        [layer.eval() for layer in layers]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            expected.append((loss.item(), F.cross_entropy(model.eval()(measured[0]), measured[1]).item()))
    torch.manual_seed(1)
    options = {**STEPS, "unfreeze": "head:1,conv2:1,all:1", "backbone_lr": 0.02, "device": "cpu"}
    result = regraft.fit(cnn(), few, precision=precision, cache_precision=kept, **options)
    assert_near(result, expected, PRECISIONS[precision] + KEPT[kept])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fit_keeps_numbers_that_16_bits_would_round(precision: str, tmp_path: Path) -> None:
    rows, drawn = [], np.random.default_rng(0)
    for number in range(60):
        level = drawn.uniform(0, 255)
        pixels = np.clip(level + drawn.normal(0, 9, (tiny.SIDE, tiny.SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", f"{1000 + level / 64:.4f}", "val" if number % 4 == 0 else "train"))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "target", "split"), *rows])
    torch.manual_seed(1)
    model = tiny.PlainCnn(num_classes=1)
    regraft.freeze(model, "conv*", "bn*")
    lines = Lines()
    result = regraft.fit(model, tmp_path / "table.csv", precision=precision, device="cpu", epochs=3, progress=lines)
    assert "chosen     learning rate" in lines
    assert result.validation.rmse is not None
    assert result.validation.rmse < 0.2  # bfloat16 has 996, 1000, 1004


def test_choose_compute_takes_on_a_gpu_what_a_cpu_takes_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16, precision in ((True, "bf16"), (False, "fp32")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
            patch.setattr(loop.torch, "empty", lambda *_, **__: None)
            compute = choose_compute("auto", "auto")
        assert compute.device.type == "cuda"
        assert compute.autocast_dtype == choose_compute("cpu", precision).autocast_dtype


# Weights in other types


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fit_refuses_a_precision_that_weights_cannot_be_cast_to(precision: str, few: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"precision='{precision}' casts weights in float32, and those of .* float64"):
        regraft.fit(cnn().double(), few, precision=precision, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_fit_refuses_to_mix_words(tmp_path: Path) -> None:
    pair = TensorDataset(torch.randint(9, (20, 5)), torch.arange(20) % 2)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 2))
    with pytest.raises(ConfigError, match=r"mixup=0.4 mixes images or features .* the inputs are int64"):
        regraft.fit(model, (pair, pair), mixup=0.4, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["KeyError", "a wrong width", "a wrong type"])
def test_fit_says_in_words_that_a_loss_fails(kind: str, few: Path, tmp_path: Path) -> None:
    losses: dict[str, Callable[..., torch.Tensor]] = {
        "KeyError": lambda outputs, targets: {}["nothing"],
        "a wrong width": lambda outputs, targets: F.mse_loss(outputs, targets.float().reshape(outputs.shape)),
        "a wrong type": lambda outputs, targets: F.cross_entropy(outputs, targets.int()),
    }
    with pytest.raises(
        LossError, match=r"the loss fails on scores of shape \(24, 2\) \(float32\) and targets of shape"
    ):
        regraft.fit(cnn(), few, loss=losses[kind], out=str(tmp_path / "run"), batch_size=24)
    assert not (tmp_path / "run").exists()


# Values that fewer bits cannot hold


class Scaled(nn.Module):
    """Features around a number: of a million float16 knows nothing, and of a ten millionth but a few bits."""

    preprocessing = HALF_SIZE

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.front, self.head = factor, nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.factor * F.relu(self.front(x)).mean((2, 3)))


NO_ROOM = "what is constant holds values that fp16 has no room for, too large or too small; cache_precision='bf16'"


@pytest.mark.parametrize(
    ("factor", "options", "reason"),
    [
        (1e6, {"cache_precision": "fp16"}, NO_ROOM),
        (1e-7, {"cache_precision": "fp16"}, NO_ROOM),
        (1e6, {"precision": "fp16"}, "what is constant is not finite for some photo"),
    ],
    ids=str,
)
def test_fit_does_not_keep_features_that_float16_has_no_room_for(
    factor: float, options: dict[str, Any], reason: str, few: Path
) -> None:
    model, lines = Scaled(factor), Lines()
    regraft.freeze(model, "front")
    is_too_large = "precision" in options  # for the network itself
    fails = pytest.raises(LossError, match="precision='fp32'") if is_too_large else nullcontext()
    with fails:
        regraft.fit(model, few, device="cpu", progress=lines, **{**STEPS, "lr": 1e-14, **options})
    assert f"every epoch runs the full network: {reason}" in lines or is_too_large
