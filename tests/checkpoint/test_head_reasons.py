"""Why a head keeps its values: the reason that the report gives is the true one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regraft import load_weights

State = dict[str, torch.Tensor]


class Network(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Pooled(nn.Module):
    """A convolution over (N, 64, H, W) and a head, linear or a 1 × 1 convolution."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 64, 3), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head(x.mean((2, 3))) if isinstance(self.head, nn.Linear) else self.head(x).mean((2, 3))


def linear(classes: int = 10, features: int = 64) -> Network:
    return Network(nn.Linear(features, classes))


def perceptron(hidden: int, classes: int = 10) -> Network:
    return Network(nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes)))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


def same(state: State) -> State:
    return state


REASONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[State], State], str]] = {
    "eight bits": (
        linear,
        linear,
        changed("head.weight", lambda t: (t * 800).to(torch.int8)),
        "'head.weight' of the head is int8 in the file and float32 in the model, so it keeps its values",
    ),
    "eight bits and other classes": (
        lambda: linear(12),
        linear,
        changed("head.weight", lambda t: (t * 800).to(torch.int8)),
        "'head.weight' of the head is int8 in the file",
    ),
    "truth values": (linear, linear, changed("head.weight", lambda t: t > 0), "is bool in the file and float32"),
    "complex": (linear, linear, changed("head.weight", lambda t: t.to(torch.complex64)), "is complex64 in the file"),
    "classes": (lambda: linear(12), linear, same, "is for 12 classes in the file and for 10 in the model"),
    "features": (
        linear,
        lambda: Network(nn.Linear(128, 10)),
        same,
        "the head 'head' is made for 64 features in the file and for 128 in the model",
    ),
    "both": (
        lambda: linear(12),
        lambda: Network(nn.Linear(128, 10)),
        same,
        "'head.weight' of the head is (12, 64) in the file and (10, 128) in the model",
    ),
    "turned": (linear, linear, changed("head.weight", lambda t: t.t().contiguous()), "look transposed (head.weight)"),
    "last of several": (
        lambda: perceptron(128, 12),
        lambda: perceptron(128),
        same,
        "the head 'head.2' is for 12 classes in the file and for 10 in the model",
    ),
    "a convolution of other classes": (
        lambda: Pooled(nn.Conv2d(64, 12, 1)),
        lambda: Pooled(nn.Linear(64, 10)),
        same,
        "the head 'head' is for 12 classes in the file and for 10 in the model",
    ),
    "absent": (
        linear,
        linear,
        lambda state: {name: tensor for name, tensor in state.items() if "head" not in name},
        "the file has no head that fits (head.weight, head.bias)",
    ),
    "no bias": (
        linear,
        linear,
        lambda state: {name: tensor for name, tensor in state.items() if name != "head.bias"},
        "the file has nothing for 1 tensors of the model (head.bias)",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_load_weights_says_why_a_head_keeps_its_values(case: str, tmp_path: Path) -> None:
    make_trained, make, change, reason = REASONS[case]
    torch.save(change(make_trained().state_dict()), tmp_path / "w.pth")
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, tmp_path / "w.pth", min_share=0)
    assert reason in report.cause
    assert ("10 classes in the file" in report.cause) is False
    kept = {*report.missing, *(name for name, _, _ in report.mismatched)}
    assert kept
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


HEADS: dict[str, tuple[nn.Module, nn.Module]] = {
    "convolution to linear": (nn.Conv2d(64, 10, 1), nn.Linear(64, 10)),
    "linear to convolution": (nn.Linear(64, 10), nn.Conv2d(64, 10, 1)),
}


@pytest.mark.parametrize("case", HEADS)
def test_load_weights_reshapes_a_head_of_the_other_kind(case: str, tmp_path: Path) -> None:
    before, after = HEADS[case]
    trained, model = Pooled(before), Pooled(after)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    x: Any = torch.randn(2, 3, 8, 8)
    assert torch.allclose(model(x), trained(x), atol=1e-6)


def test_load_weights_never_calls_hidden_units_classes(tmp_path: Path) -> None:
    torch.save(perceptron(256).state_dict(), tmp_path / "w.pth")
    report = load_weights(perceptron(128), tmp_path / "w.pth", dry_run=True, adapt=("head",))
    assert "classes" not in report.cause
    assert not [change for change in report.adapted if change.kind == "head"]
