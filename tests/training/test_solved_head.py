"""Solved heads against scikit-learn, and a run whose head is solved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.errors import ConfigError
from regraft.training.heads.calibration import fit_factor
from regraft.training.heads.class_means import ClassMeans
from regraft.training.heads.components import Components
from regraft.training.heads.folds import Folds
from regraft.training.heads.softmax_regression import SoftmaxRegression
from regraft.training.heads.solved_head import is_solvable, solve_head
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
@pytest.mark.parametrize(("width", "is_standardized"), [(8, True), (40, False), (300, True), (300, False)])
def test_softmax_regression_is_scikit_learns(outputs: int, width: int, is_standardized: bool) -> None:
    features, targets = classes(200, width, outputs)
    components = Components.of(features, is_standardized=is_standardized)
    regression = SoftmaxRegression(components, F.one_hot(targets, outputs).float())
    heads = regression.solve(regression.zeros(1), torch.full((1, 200), 1 / 200), 0.03, tolerance=1e-6)
    weights, biases = regression.parts(heads, 0.03)
    weight, bias = components.to_features(weights[0], biases[0])
    mean, std = features.mean(0), features.std(0, correction=0)
    std = std if is_standardized else std.square().mean().sqrt()
    penalty = 0.03 / 2 if outputs == 2 else 0.03  # of two classes they weigh one vector, not two
    theirs = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-9, max_iter=10_000)
    scaled = ((features - mean) / std).double().numpy()
    expected = torch.from_numpy(theirs.fit(scaled, targets.numpy()).predict_proba(scaled))
    assert ((features @ weight.T + bias).softmax(1) - expected).abs().max() < 2e-3


def test_softmax_regression_goes_on_from_another_penalty() -> None:
    features, targets = classes(100, 20, 3)
    regression = SoftmaxRegression(Components.of(features, is_standardized=False), F.one_hot(targets, 3).float())
    equal = torch.full((1, 100), 0.01)
    strong = regression.solve(regression.zeros(1), equal, 1.0, tolerance=1e-6)
    warm = regression.solve(strong, equal, 0.01, tolerance=1e-6, previous=1.0)
    cold = regression.solve(regression.zeros(1), equal, 0.01, tolerance=1e-6)
    assert torch.allclose(regression.scores(warm, 0.01), regression.scores(cold, 0.01), atol=1e-3)


@pytest.mark.parametrize("shrinkage", [0.1, 0.6, 1.0])
@pytest.mark.parametrize(("count", "width"), [(90, 12), (60, 100)])
def test_class_means_are_scikit_learns_discriminants(count: int, width: int, shrinkage: float) -> None:
    features, targets = classes(count, width, 3)
    components, folds = Components.of(features, is_standardized=True), Folds.of(targets, views=1, seed=0)
    weights, biases = ClassMeans(components, targets, 3, folds, torch.ones(count)).solve(shrinkage, slice(None))
    inputs = components.rows.double().numpy()
    for fold in (0, 4, 5):  # the last one is that of all rows
        rows = folds.numbers != fold
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(inputs[rows], targets[rows].numpy())
        ours = components.rows @ weights[fold] + biases[fold]
        assert (ours.softmax(1) - torch.from_numpy(theirs.predict_proba(inputs))).abs().max() < 5e-3


def test_components_are_the_features_in_other_coordinates() -> None:
    """Scores by mapped weights are those of the rows, for more features than rows, fewer, and too many to rotate."""
    for count, width in ((30, 90), (90, 30), (1_100, 1_050)):
        features = classes(count, width, 2)[0].double()
        components = Components.of(features, is_standardized=True)
        weight, bias = torch.randn(components.rows.shape[1], 4).double(), torch.randn(4).double()
        mapped, shift = components.to_features(weight, bias)
        assert torch.allclose(features @ mapped.T + shift, components.rows @ weight + bias, atol=1e-4)
        assert torch.allclose(components.rows.square().mean(0), components.variances, rtol=1e-3, atol=1e-5)


def test_folds_leave_each_class_out_evenly_and_its_only_photo_never() -> None:
    targets = torch.tensor([0] * 12 + [1] * 3 + [2]).repeat_interleave(2)
    folds = Folds.of(targets, views=2, seed=0)
    numbers = folds.numbers.view(-1, 2)
    assert torch.equal(numbers[:, 0], numbers[:, 1])  # both views
    assert numbers[-1, 0] == -1
    assert torch.bincount(numbers[:12, 0], minlength=5).tolist() in ([2, 2, 3, 3, 2], [3, 3, 2, 2, 2], [3, 2, 2, 2, 3])
    assert len(set(numbers[12:15, 0].tolist())) == 3
    assert torch.allclose(folds.learned(torch.ones(32)).sum(1), torch.ones(5))


def test_fit_factor_is_the_best_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (300,), generator=generator)
    scores = 7 * (F.one_hot(targets, 4) + 0.8 * torch.randn(300, 4, generator=generator))
    weights = torch.rand(300, generator=generator)

    def loss(factor: float) -> float:
        logs = (factor * scores).log_softmax(1)
        own, any_class = logs.gather(1, targets[:, None])[:, 0], logs.mean(1)
        return -float((weights * ((1 - 1 / 302) * own + any_class / 302)).sum() / weights.sum())

    best = minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-5}).x
    assert fit_factor(scores, targets, weights, 300) == pytest.approx(best, rel=1e-2)
    assert fit_factor(100 * scores, targets, weights, 300) == pytest.approx(best / 100, rel=1e-2)


def test_fit_factor_of_scores_that_are_all_right_or_all_equal_is_finite() -> None:
    targets = torch.arange(20) % 2
    for scores in (F.one_hot(targets).float() * 5, torch.zeros(20, 2)):
        assert 0 < fit_factor(scores, targets, torch.ones(20), 20) < 1_000


def test_solve_head_takes_the_way_that_is_best_on_photos_it_has_not_seen() -> None:
    features, targets = classes(150, 30, 3, distance=0.3)
    solved = solve_head(features, targets, 3)
    assert solved is not None
    least = min(solved.fold_losses.values())
    assert solved.fold_losses[solved.way] == next(iter(solved.fold_losses.values()))
    assert solved.fold_losses[solved.way] < least + 0.05  # another may be best within an error
    unseen, labels = classes(3_000, 30, 3, distance=0.3)
    loss = float(F.cross_entropy(unseen[150:] @ solved.weight.T + solved.bias, labels[150:]))
    assert loss == pytest.approx(solved.fold_losses[solved.way], rel=0.25)
    assert float(F.nll_loss(solved.out_of_fold, targets)) == pytest.approx(solved.fold_losses[solved.way], abs=1e-4)


def test_solve_head_keeps_the_views_of_a_photo_in_one_fold() -> None:
    """Two equal views say nothing new, so neither penalty nor losses change; in two folds the second would be known."""
    features, targets = classes(60, 100, 4, distance=0.2)
    once = solve_head(features, targets, 4)
    twice = solve_head(features.repeat_interleave(2, 0), targets.repeat_interleave(2), 4, views=2)
    assert once is not None
    assert twice is not None
    assert twice.out_of_fold.shape == once.out_of_fold.shape == (60, 4)
    first, second = (next(iter(solved.fold_losses.values())) for solved in (once, twice))
    assert second == pytest.approx(first, rel=0.02)


def test_solve_head_weighs_classes_as_the_cross_entropy_does() -> None:
    features, targets = classes(100, 3, 2, distance=0.3)
    weights = torch.tensor([1.0, 8.0])
    plain, weighted = solve_head(features, targets, 2), solve_head(features, targets, 2, class_weights=weights)
    assert plain is not None
    assert weighted is not None
    scores = features @ weighted.weight.T + weighted.bias
    assert weighted.loss == pytest.approx(float(F.cross_entropy(scores, targets, weight=weights)), abs=1e-4)
    assert (scores.argmax(1) == 1).sum() > ((features @ plain.weight.T + plain.bias).argmax(1) == 1).sum()


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1], [0, 1, 2, 2], [0, 0, 1, 1]])
def test_solve_head_takes_the_fewest_photos(labels: list[int]) -> None:
    targets = torch.tensor(labels)
    features = F.one_hot(targets, 5).float() + torch.arange(len(labels))[:, None] / 100
    solved = solve_head(features, targets, 3)
    assert solved is not None
    assert (features @ solved.weight.T + solved.bias).argmax(1).tolist() == labels
    assert solved.out_of_fold.isfinite().all()


def test_solve_head_predicts_numbers_by_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=generator) * torch.tensor([1, 10, 0.1, 5, 1, 1])
    targets = features[:, 0] * 3 - features[:, 2] + 2 + 0.01 * torch.randn(80, generator=generator)
    solved = solve_head(features, targets, 1)
    assert solved is not None
    assert (features @ solved.weight.T + solved.bias)[:, 0].sub(targets).abs().max() < 0.1
    assert solved.out_of_fold.shape == (80, 1)


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
    assert constant.weight.abs().max() < 1e-3
    apart = solve_head(F.one_hot(torch.arange(40) % 4).float() * 1000, torch.arange(40) % 4, 4)
    assert apart is not None
    assert apart.weight.isfinite().all()
    assert apart.loss < 0.05  # any photo could have been another


def test_is_solvable_knows_what_is_too_much() -> None:
    assert is_solvable(6_400, 2_048, 10, views=2)
    assert not is_solvable(10**6, 2_048, 10)
    assert not is_solvable(1, 8, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 20, measured=20)


def test_fit_with_a_solved_head_takes_one_epoch_and_changes_nothing_else(photos: Path) -> None:
    model, lines = built("cnn, head"), Lines()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = regraft.fit(model, photos, head="solved", progress=lines, device="cpu")
    assert len(result.history) == 1
    assert "head       solved, not trained" in lines
    assert "(loss on photos not learned from: " in lines
    changed = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    trained = regraft.fit(built("cnn, head"), photos, head="given", device="cpu")
    assert result.validation.accuracy == pytest.approx(trained.validation.accuracy, abs=0.1)
    assert regraft.evaluate(result.model, photos / "val", device="cpu").accuracy == result.validation.accuracy


def test_fit_with_a_solved_head_is_resumed_and_repeated(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head": "solved", "device": "cpu"}
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
        ("cnn, head", {"loss": "focal"}, "the loss is neither the cross-entropy nor the squared error"),
    ],
)
def test_fit_refuses_to_solve_what_has_to_be_trained(
    name: str, options: dict[str, Any], message: str, photos: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"head='solved' needs a linear head .*{message}"):
        regraft.fit(built(name), photos, head="solved", device="cpu", **options)


def test_fit_solves_with_the_weights_of_a_loss_of_the_callers(photos: Path) -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 30.0]))
    plain, lines = regraft.fit(built("cnn, head"), photos, device="cpu"), Lines()
    result = regraft.fit(built("cnn, head"), photos, device="cpu", loss=weighted, progress=lines)
    assert "head       solved, not trained" in lines
    assert result.outputs.argmax(1).sum() >= plain.outputs.argmax(1).sum()
    assert result.history[0].train_loss != plain.history[0].train_loss
