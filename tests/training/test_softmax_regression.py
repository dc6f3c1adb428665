"""Solved heads against scikit-learn, and a run whose head is solved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import ConfigError
from regraft.training.heads.softmax_regression import FOLDS, PENALTIES, is_solvable, solve_head
from training.by_hand import built, write_photos
from training.factories import Lines


def classes(count: int, width: int, outputs: int, distance: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features around the centers of classes, of different spreads, and their labels."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(outputs, width, generator=generator) * distance
    targets = torch.arange(count) % outputs
    features = centers[targets] + torch.randn(count, width, generator=generator)
    return features * torch.logspace(-2, 2, width) + 5, targets


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("width", [8, 40, 300])
def test_solve_head_is_scikit_learns_solution_for_the_chosen_penalty(outputs: int, width: int) -> None:
    features, targets = classes(200, width, outputs)
    solved = solve_head(features, targets, outputs)
    assert solved is not None
    mean, std = features.mean(0), features.std(0)
    penalty = solved.penalty / 2 if outputs == 2 else solved.penalty  # of two classes they weigh one vector, not two
    theirs = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-8, max_iter=10_000)
    theirs.fit(((features - mean) / std).numpy(), targets.numpy())
    scores = features @ solved.weight.T + solved.bias
    expected = torch.from_numpy(theirs.predict_proba(((features - mean) / std).numpy()))
    assert (scores.softmax(1) - expected).abs().max() < 5e-3
    assert solved.loss == pytest.approx(float(F.cross_entropy(scores, targets)), abs=1e-3)


def test_solve_head_chooses_the_penalty_by_photos_that_it_has_not_seen() -> None:
    """The losses are those of heads that are fitted by scikit-learn without a fold, and the least of them is taken."""
    features, targets = classes(150, 30, 3, distance=0.3)
    solved = solve_head(features, targets, 3)
    assert solved is not None
    assert solved.penalty == PENALTIES[solved.fold_losses.index(min(solved.fold_losses))]
    assert solved.penalty < 1  # a head of zeros is not the best
    unseen, labels = classes(3_000, 30, 3, distance=0.3)
    loss = float(F.cross_entropy(unseen[150:] @ solved.weight.T + solved.bias, labels[150:]))
    assert loss == pytest.approx(min(solved.fold_losses), rel=0.25)


def test_solve_head_keeps_the_views_of_a_photo_in_one_fold() -> None:
    """Two equal views say nothing new, so neither penalty nor losses change; in two folds the second would be known."""
    features, targets = classes(60, 100, 4, distance=0.2)
    once = solve_head(features, targets, 4)
    twice = solve_head(features.repeat_interleave(2, 0), targets.repeat_interleave(2), 4, views=2)
    assert once is not None
    assert twice is not None
    assert twice.penalty == once.penalty
    assert twice.fold_losses == pytest.approx(once.fold_losses, rel=0.02)  # N - 1 in the spread


def test_solve_head_smooths_labels_as_the_cross_entropy_does() -> None:
    features, targets = classes(100, 10, 3)
    solved = solve_head(features, targets, 3, smoothing=0.2)
    assert solved is not None
    scores = features @ solved.weight.T + solved.bias
    assert solved.loss == pytest.approx(float(F.cross_entropy(scores, targets, label_smoothing=0.2)), abs=1e-3)


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, None), (torch.float32, float("nan"))])
def test_solve_head_takes_halves_and_refuses_what_is_not_finite(dtype: torch.dtype, value: float | None) -> None:
    features, targets = classes(40, 6, 2)
    features = features.to(dtype)
    if value is not None:
        features[3, 2] = value
    solved = solve_head(features, targets, 2)
    assert (solved is None) == (value is not None)


def test_solve_head_solves_where_nothing_tells_classes_apart_or_everything_does() -> None:
    constant = solve_head(torch.ones(20, 4), torch.arange(20) % 2, 2)
    assert constant is not None
    assert not constant.weight.any()
    apart = solve_head(F.one_hot(torch.arange(40) % 4).float() * 1000, torch.arange(40) % 4, 4)
    assert apart is not None
    assert apart.weight.isfinite().all()
    assert apart.loss < 0.01


def test_is_solvable_knows_what_is_too_much_or_too_little() -> None:
    assert is_solvable(6_400, 2_048, 10, views=2)
    assert not is_solvable(10**6, 2_048, 10)
    assert not is_solvable(2 * FOLDS - 1, 8, 2)
    assert is_solvable(2 * FOLDS, 8, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 20, measured=20)


def test_fit_with_a_solved_head_takes_one_epoch_and_changes_nothing_else(photos: Path) -> None:
    model, lines = built("cnn, head"), Lines()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = regraft.fit(model, photos, head_start="solved", progress=lines, device="cpu")
    assert len(result.history) == 1
    assert "head       solved, not trained" in lines
    assert "chosen     penalty" in lines
    changed = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    trained = regraft.fit(built("cnn, head"), photos, head_start="given", device="cpu")
    assert result.validation.accuracy == pytest.approx(trained.validation.accuracy, abs=0.1)
    assert regraft.evaluate(result.model, photos / "val", device="cpu").accuracy == result.validation.accuracy


def test_fit_with_a_solved_head_is_resumed_and_repeated(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head_start": "solved", "device": "cpu"}
    first = regraft.fit(built("cnn, head"), photos, out=str(tmp_path / "run"), **options)
    again = regraft.fit(built("cnn, head"), photos, config=first.config.updated(out=str(tmp_path / "again")))
    for ours, theirs in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cnn, half", {}, "what is trained is not one linear layer with a bias"),
        ("cnn, head", {"cache": False}, "nothing is computed once"),
        ("cnn, head", {"mixup": 0.2}, "mixup is for steps"),
        ("cnn, head", {"optimizer": "sgd"}, "optimizer is for steps"),
        ("cnn, head", {"loss": "focal"}, "the loss is another one than the cross-entropy"),
    ],
)
def test_fit_refuses_to_solve_what_has_to_be_trained(
    name: str, options: dict[str, Any], message: str, photos: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"head_start='solved' needs a linear head .*{message}"):
        regraft.fit(built(name), photos, head_start="solved", device="cpu", **options)


def test_fit_does_not_solve_with_a_loss_of_the_callers(photos: Path) -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    with pytest.raises(ConfigError, match="the loss is another one"):
        regraft.fit(built("cnn, head"), photos, head_start="solved", device="cpu", loss=weighted)
