from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oracles import identical
from regraft.errors import ConfigError, LossError, TrustError
from regraft.training.losses import FocalLoss, build_loss, check_loss

SCORES, CLASSES = torch.randn(9, 4) * 3, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
NUMBERS, TARGETS = torch.randn(9, 1), torch.randn(9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_focal_loss_without_gamma_is_the_cross_entropy(scale: float) -> None:
    assert torch.allclose(FocalLoss(0.0)(SCORES * scale, CLASSES), F.cross_entropy(SCORES * scale, CLASSES))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_is_its_definition(gamma: float) -> None:
    expected = 0.0
    for scores, target in zip(SCORES.double(), CLASSES, strict=True):
        probability = (scores[target].exp() / scores.exp().sum()).item()
        expected -= (1 - probability) ** gamma * torch.tensor(probability).double().log().item() / len(CLASSES)
    assert FocalLoss(gamma)(SCORES, CLASSES).item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_has_finite_gradients_where_a_prediction_is_certain() -> None:
    scores = (torch.eye(4) * 200).requires_grad_()
    FocalLoss()(scores, torch.arange(4)).backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        (None, "classification", F.cross_entropy(SCORES, CLASSES)),
        ("cross-entropy", "classification", F.cross_entropy(SCORES, CLASSES)),
        (None, "regression", F.mse_loss(NUMBERS[:, 0], TARGETS)),
        ("mse", "regression", F.mse_loss(NUMBERS[:, 0], TARGETS)),
        ("l1", "regression", F.l1_loss(NUMBERS[:, 0], TARGETS)),
        ("huber", "regression", F.huber_loss(NUMBERS[:, 0], TARGETS)),
    ],
)
def test_build_loss_gives_torchs_loss_for_a_name(name: str | None, task: str, expected: torch.Tensor) -> None:
    arguments = (SCORES, CLASSES) if task == "classification" else (NUMBERS, TARGETS)
    assert identical(build_loss(name, task)(*arguments), expected)


def test_build_loss_smooths_labels() -> None:
    smoothed = build_loss("cross-entropy", "classification", label_smoothing=0.1)(SCORES, CLASSES)
    assert identical(smoothed, F.cross_entropy(SCORES, CLASSES, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("focall", "classification", "no loss 'focall' for classification. Nearest: 'focal'."),
        (
            "mse",
            "classification",
            "no loss 'mse' for classification. Choose from cross-entropy, focal, or py:",
        ),
        ("cross-entropy", "regression", "no loss 'cross-entropy' for regression."),
    ],
)
def test_build_loss_refuses_an_unknown_name(name: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_loss(name, task)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "source", ["def made(outputs, targets): return outputs.mean()", "import torch\nmade = torch.nn.CrossEntropyLoss"]
)
def test_build_loss_takes_a_function_or_a_class_of_ones_own(source: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(source)
    name = f"py:{tmp_path / 'own.py'}:made"
    with pytest.raises(TrustError):
        build_loss(name, "classification")
    assert check_loss(build_loss(name, "classification", trust_code=True)(SCORES, CLASSES)).ndim == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, "the loss returned a float, expected a tensor with one number."),
        (None, "the loss returned a NoneType"),
        (torch.zeros(3), "the loss returned a tensor of shape (3,), expected one number. Reduce it"),
        (nn.CrossEntropyLoss(reduction="none")(SCORES, CLASSES), "a tensor of shape (9,)"),
    ],
)
def test_check_loss_refuses_what_is_no_single_number(value: object, message: str) -> None:
    with pytest.raises(LossError) as caught:
        check_loss(value)
    assert message in str(caught.value)
