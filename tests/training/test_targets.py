"""Targets of every kind that loaders yield: taken, with the loss that torch gives for them, or refused by name."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import regraft
from regraft.errors import DataError, LossError, ModelError, RegraftError
from regraft.training.checks.targets import class_labels, fit_targets, labels_in_memory

X = torch.linspace(-2, 2, 24 * 6).sin().view(24, 6)
Y = torch.arange(24) % 3
NUMBERS = torch.linspace(-1, 1, 24)
ONE_HOT = F.one_hot(Y, 3)
SHARES = torch.linspace(0, 9, 72).view(24, 3).cos().softmax(1)
SEVERAL = (torch.linspace(0, 30, 72).cos().view(24, 3) > 0).float().index_fill_(0, torch.tensor([0]), 1.0)


def loss_name(loss: Any) -> str:
    """Name a case the same in every process, which the address in a function's text is not."""
    return getattr(loss, "__name__", str(loss))


class Items(Dataset[Any]):
    """A dataset of which nothing is known but what it returns."""

    def __init__(self, targets: Any) -> None:
        self.targets_ = targets

    def __len__(self) -> int:
        return len(self.targets_)

    def __getitem__(self, index: int) -> Any:
        return X[index], self.targets_[index]


class Squeezed(nn.Linear):
    """Returns (N,)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).squeeze(1)


def first_loss(model: nn.Module, targets: Any, loss: Any = None, validation: Any = None) -> tuple[float, Any]:
    """Return the training loss of one epoch that is one batch, which is the loss of the untrained network."""
    data = targets if isinstance(targets, Dataset) else TensorDataset(X, targets)
    options = {"loss": loss} if loss is not None else {}
    result = regraft.fit(model, (data, validation or data), epochs=1, batch_size=24, lr=1e-9, **options)
    return result.history[0].train_loss, result


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(), F.cross_entropy, "focal"], ids=loss_name)
@pytest.mark.parametrize(
    "targets",
    [
        Y.int(),
        Y.to(torch.uint8),
        Y.to(torch.int16),
        Y[:, None],
        Y.int()[:, None],
        Items(Y.tolist()),
        Items(list(Y.numpy().astype(np.int32))),
        Items(list(Y.numpy().astype(np.uint8))),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_fit_takes_classes_of_every_integer_type(targets: Any, loss: Any) -> None:
    model = nn.Linear(6, 3)
    scores = model(X)
    right = scores.log_softmax(1).gather(1, Y[:, None])
    expected = (-((1 - right.exp()) ** 2) * right).mean() if loss == "focal" else F.cross_entropy(scores, Y)
    found, result = first_loss(model, targets, loss)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.accuracy == pytest.approx((scores.argmax(1) == Y).double().mean().item())


def test_fit_takes_booleans_as_two_classes() -> None:
    model = nn.Linear(6, 2)
    expected = F.cross_entropy(model(X), (Y == 1).long())
    assert first_loss(model, Y == 1)[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "loss"),
    [
        (ONE_HOT, None),
        (ONE_HOT.float(), None),
        (ONE_HOT.double(), nn.CrossEntropyLoss()),
        (SHARES, nn.CrossEntropyLoss()),
        (SHARES.double(), F.cross_entropy),
        (SHARES, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))),
    ],
)
def test_fit_takes_rows_of_shares_as_classes(targets: torch.Tensor, loss: Any) -> None:
    model = nn.Linear(6, 3)
    scores = model(X)
    expected = (loss or F.cross_entropy)(scores, targets.float())
    found, result = first_loss(model, targets, loss)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.accuracy == pytest.approx((scores.argmax(1) == targets.argmax(1)).double().mean().item())


def test_fit_takes_shares_to_learn_from_and_classes_to_measure_on() -> None:
    model = nn.Linear(6, 3)
    expected = F.cross_entropy(model(X), SHARES)
    found, result = first_loss(model, SHARES, validation=TensorDataset(X, Y))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.task == "classification"


@pytest.mark.parametrize("loss", [None, nn.MSELoss(), F.mse_loss, "mse", nn.L1Loss(), nn.HuberLoss()], ids=loss_name)
@pytest.mark.parametrize("shape", [(24,), (24, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear, Squeezed])
def test_fit_compares_each_output_with_its_number(kind: Any, dtype: torch.dtype, shape: Any, loss: Any) -> None:
    model = kind(6, 1)
    by_hand = loss if callable(loss) else F.mse_loss
    expected = by_hand(model(X).flatten(), NUMBERS.to(dtype).float())
    found, result = first_loss(model, NUMBERS.to(dtype).view(shape), loss)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert result.validation.mae == pytest.approx((model(X).flatten() - NUMBERS).abs().mean().item(), rel=1e-2)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), F.smooth_l1_loss], ids=loss_name)
def test_fit_takes_whole_numbers_where_the_loss_compares_numbers(loss: Any) -> None:
    model = nn.Linear(6, 1)
    expected = loss(model(X).flatten(), Y.float())
    found, result = first_loss(model, Y, loss)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.task == "regression"


@pytest.mark.parametrize("targets", [SEVERAL, SEVERAL.double()])
def test_fit_learns_several_classes_at_once_by_a_loss_for_that(targets: torch.Tensor) -> None:
    model = nn.Linear(6, 3)
    scores = model(X)
    expected = F.binary_cross_entropy_with_logits(scores, SEVERAL)
    found, result = first_loss(model, targets, nn.BCEWithLogitsLoss())
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.mae == pytest.approx((scores.sigmoid() - SEVERAL).abs().mean().item(), rel=1e-5)


def test_fit_leaves_ignored_labels_out_of_loss_and_metrics() -> None:
    model = nn.Linear(6, 3)
    targets = Y.masked_fill(Y == 1, -1)
    expected = F.cross_entropy(model(X), targets, ignore_index=-1)
    found, result = first_loss(model, targets, nn.CrossEntropyLoss(ignore_index=-1))
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert result.validation.count == 16


REFUSED: list[tuple[Any, int, Any, str]] = [
    (Y.masked_fill(Y == 0, -1), 3, None, "the training data has the label -1, the network has 3 outputs"),
    (Y + 1, 3, None, "gives 3 scores, the data has 4 classes"),
    (torch.cat([Y[:23], torch.tensor([7])]).int(), 3, nn.CrossEntropyLoss(), "gives 3 scores, the data has 8 classes"),
    (SHARES, 3, None, "rows of shares that add up to 1, which may be classes or numbers"),
    (
        SEVERAL,
        3,
        None,
        r"rows of 0 and 1 with several classes each.*pass loss=nn\.BCEWithLogitsLoss\(\)".replace("pass", "Pass"),
    ),
    (SEVERAL.long(), 3, None, "with several classes a sample or none"),
    (SEVERAL.long(), 3, nn.BCEWithLogitsLoss(), r"return targets\.float\(\)"),
    (Y % 2, 1, nn.BCEWithLogitsLoss(), "Use one output for each class and cross-entropy"),
    (Y.float(), 3, nn.CrossEntropyLoss(), r"Return targets\.long\(\), or pass loss='mse'"),
    (NUMBERS, 3, None, r"outputs have the shape \(24, 3\) and the targets \(24,\), which MSELoss cannot compare"),
    (NUMBERS, 3, nn.L1Loss(), "which L1Loss cannot compare"),
    (Items([None] * 24), 3, None, "cannot be put into a batch: default_collate"),
    (Items(["a"] * 24), 3, None, "yields a list of Tensor and tuple, expected pairs"),
    (Y, 3, lambda outputs, targets: F.mse_loss(outputs.flatten()[:5], targets), "the loss fails on scores of shape"),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("targets", "outputs", "loss", "message"), REFUSED)
def test_fit_refuses_what_cannot_be_meant_before_training(targets: Any, outputs: int, loss: Any, message: str) -> None:
    model = nn.Linear(6, outputs)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((DataError, ModelError, LossError), match=message):
        first_loss(model, targets, loss)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"pixel_values": X, "labels": Y}], "yields a dict with 'pixel_values', 'labels', expected pairs"),
        ([(X, Y, Y)], "yields a tuple of 3, expected pairs"),
        ([(X.numpy(), Y.numpy())], "yields a tuple of ndarray and ndarray"),
        ([X], "yields Tensor, expected pairs"),
        ([(X, Y + 2)], "data has the label 3|has 5 classes"),
    ],
)
@pytest.mark.parametrize("part", ["training", "validation"])
def test_fit_refuses_batches_of_another_form(data: Any, message: str, part: str) -> None:
    good, model = TensorDataset(X, Y), nn.Linear(6, 3)
    with pytest.raises(RegraftError, match=message):
        regraft.fit(model, (data, good) if part == "training" else (good, data), epochs=1)


@pytest.mark.parametrize("shift", [-1, 1, 40])
@pytest.mark.parametrize("kind", ["tensors", "loader", "list", "subset", "joined"])
def test_fit_refuses_labels_to_measure_on_that_are_none_before_training(kind: str, shift: int) -> None:
    last = torch.cat([Y[:23], Y[23:] + shift if shift > 0 else torch.tensor([-1])])
    data = TensorDataset(X, last)
    forms: dict[str, Any] = {
        "tensors": data,
        "loader": DataLoader(data, 5),
        "list": DataLoader(list(zip(X, last.tolist(), strict=True)), 5),
        "subset": Subset(data, [0, 23]),
        "joined": ConcatDataset([TensorDataset(X, Y), data]),
    }
    model = nn.Linear(6, 3)
    before = copy.deepcopy(model.state_dict())
    label = -1 if shift < 0 else int(last[-1])
    with pytest.raises(DataError, match=f"the validation data has the label {label}, the network has 3 outputs"):
        regraft.fit(model, (TensorDataset(X, Y), forms[kind]), epochs=1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("part", "epochs"), [("training", 1), ("validation", 1)])
def test_fit_names_a_label_that_could_not_be_known_before(part: str, epochs: int) -> None:
    bad, good = DataLoader(Items([0] * 23 + [9]), 6), TensorDataset(X, Y)
    with pytest.raises(DataError, match="the data has the label 9, the network has 3 outputs"):
        regraft.fit(nn.Linear(6, 3), (bad, good) if part == "training" else (good, bad), epochs=epochs)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(
    "targets", [Y.int(), Y.to(torch.uint8), Y[:, None], Y.int()[:, None], ONE_HOT, ONE_HOT.float(), ONE_HOT.bool()]
)
def test_evaluate_takes_the_same_kinds(targets: torch.Tensor, is_trained: bool) -> None:
    model = nn.Linear(6, 3)
    if is_trained:
        regraft.fit(model, (TensorDataset(X, Y),) * 2, epochs=1)
    expected = (model(X).argmax(1) == Y).double().mean().item()
    assert regraft.evaluate(model, TensorDataset(X, targets)).accuracy == pytest.approx(expected)
    with pytest.raises(DataError, match="the data has the label 3"):
        regraft.evaluate(model, TensorDataset(X, Y + 1))


def test_evaluate_takes_booleans_as_two_classes() -> None:
    model = nn.Linear(6, 2)
    expected = (model(X).argmax(1) == (Y == 1).long()).double().mean().item()
    assert regraft.evaluate(model, TensorDataset(X, Y == 1)).accuracy == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(24,), (24, 1)])
def test_evaluate_compares_each_output_with_its_number(shape: tuple[int, ...]) -> None:
    model = nn.Linear(6, 1)
    found = regraft.evaluate(model, TensorDataset(X, NUMBERS.view(shape)))
    assert found.mae == pytest.approx((model(X).flatten() - NUMBERS).abs().mean().item())


def test_fit_targets_leaves_targets_of_an_unknown_loss_as_they_are() -> None:
    targets = Y.int()[:, None]
    assert fit_targets(lambda outputs, targets: outputs.sum(), torch.zeros(24, 3), targets) is targets


def test_class_labels_refuses_another_shape() -> None:
    with pytest.raises(DataError, match=r"the targets are float32 of the shape \(24,\), expected classes \(N,\)"):
        class_labels(torch.zeros(24, 3), NUMBERS)


def test_labels_in_memory_reads_nothing() -> None:
    assert labels_in_memory(Items(Y)) is None
    assert labels_in_memory(DataLoader(TensorDataset(X, Y), 5, collate_fn=lambda items: items)) is None
    assert labels_in_memory(TensorDataset(X, Y)) is Y
