"""Many heads trained together are what each would be alone."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch import nn
from torch.nn import functional as F

import regraft
from regraft.card import Preprocessing
from regraft.data.photos import Photos
from regraft.data.samples import Sample
from regraft.data.transforms import augmentation
from regraft.errors import ConfigError
from regraft.training.features.batches import FeatureBatches, Features
from regraft.training.heads import sweep
from regraft.training.heads.ridge import PENALTIES, ridge
from regraft.training.heads.sweep import HeadChoice, ridge_start, sweep_heads
from training.factories import Lines, half_frozen, run, write_photos

COUNT, WIDTH = 60, 6


def batches(noise: float = 0.5) -> FeatureBatches:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(COUNT) % 3
    rows = torch.randn(COUNT, WIDTH, generator=generator) * noise
    rows[torch.arange(COUNT), targets] += 1
    preprocessing = Preprocessing(size=8, resize=8)
    samples = tuple(Sample(Path(f"{index}.png"), int(target)) for index, target in enumerate(targets))
    photos = Photos(samples, preprocessing, augmentation("none", preprocessing))
    features = Features((rows,), (torch.float32,), "full", 0.0, 1, 0.0, 0.0, False, "memory")
    return FeatureBatches(features, photos, 16)


def options(**changed: Any) -> dict[str, Any]:
    return {"epochs": 4, "decays": (0.05, 1.0), "may_start_from_ridge": False, "seed": 3, **changed}


def test_sweep_heads_makes_of_each_head_what_torchs_own_optimizer_makes_of_it() -> None:
    head, data = nn.Linear(WIDTH, 3), batches()
    found = sweep_heads(head, data, F.cross_entropy, **options())
    assert found is not None
    generator = torch.Generator().manual_seed(3)
    folds = torch.randperm(COUNT, generator=generator).view(5, 12)
    others = [torch.cat([folds[j] for j in range(5) if j != i]) for i in range(5)]
    orders = [[torch.randperm(48, generator=generator) for _ in folds] for _ in range(4)]
    torch.manual_seed(3)
    starts = [head, *(nn.Linear(WIDTH, 3) for _ in folds[1:])]
    expected = torch.zeros(len(found.tried))
    for position, fold in enumerate(folds):
        steps = [rows for epoch in orders for rows in others[position][epoch[position]].split(16)]
        for pair, choice in enumerate(found.tried):
            alone = copy.deepcopy(starts[position])
            groups = [
                {"params": [alone.weight], "weight_decay": choice.weight_decay},
                {"params": [alone.bias], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=choice.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
            for rows in steps:
                (inputs,), targets = data.pick(rows, torch.zeros_like(rows))
                optimizer.zero_grad()
                F.cross_entropy(alone(inputs), targets).backward()
                optimizer.step()
                schedule.step()
            (inputs,), targets = data.pick(fold, torch.zeros_like(fold))
            expected[pair] += F.cross_entropy(alone(inputs), targets).detach() / 5
    assert torch.allclose(torch.tensor(found.losses), expected, atol=1e-5)
    assert found.losses[found.tried.index(found.best)] == min(found.losses)


def test_sweep_heads_leaves_the_network_and_the_random_state_as_they_are(random_state: Any) -> None:
    live = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 3))
    before, state = copy.deepcopy(live.state_dict()), random_state()
    assert sweep_heads(live, batches(), F.cross_entropy, **options()) is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert random_state() == state
    assert all(parameter.grad is None for parameter in live.parameters())


def test_sweep_heads_leaves_alone_what_cannot_be_trained_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert sweep_heads(norm, batches(), F.cross_entropy, **options()) is None
    monkeypatch.setattr(sweep, "MAX_PARAMETERS", 10)
    assert sweep_heads(nn.Linear(WIDTH, 3), batches(), F.cross_entropy, **options()) is None
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "MIN_PHOTOS", COUNT + 1)
    assert sweep_heads(nn.Linear(WIDTH, 3), batches(), F.cross_entropy, **options()) is None


def drawn_regression(count: int, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, len(scales), generator=generator, dtype=torch.float64)
    targets = features @ torch.randn(len(scales), generator=generator, dtype=torch.float64)
    return features * scales, targets + 2 * torch.randn(count, generator=generator, dtype=torch.float64)


def test_ridge_is_scikit_learns_at_the_penalty_that_leaving_one_out_chooses() -> None:
    features, targets = drawn_regression(40, torch.logspace(-2, 2, 7, dtype=torch.float64))
    found = ridge(features, targets, 1)
    assert found is not None
    weight, bias = found
    spread = features.std(0)
    squares = torch.linalg.svdvals((features - features.mean(0)) / spread).square().mean()
    oracle = RidgeCV(alphas=(PENALTIES * squares).numpy()).fit((features / spread).numpy(), targets.numpy())
    assert oracle.alpha_ not in (oracle.alphas[0], oracle.alphas[-1])
    assert np.allclose(weight[0].numpy() * spread.numpy(), oracle.coef_)
    assert np.allclose(bias.item(), oracle.intercept_)


def test_ridge_leaves_all_views_of_a_photo_out_at_once() -> None:
    originals, targets = drawn_regression(24, torch.ones(20, dtype=torch.float64))
    noise = torch.randn(24, 3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features = (originals[:, None] + 0.1 * noise).flatten(0, 1)
    targets = targets.repeat_interleave(3)
    found = ridge(features, targets, 1, views=3)
    assert found is not None
    scaled = ((features - features.mean(0)) / features.std(0)).numpy()
    alphas = (PENALTIES * torch.linalg.svdvals(torch.from_numpy(scaled)).square().mean()).numpy()
    centred = targets.numpy() - targets.numpy().mean()
    errors = []
    for alpha in alphas:  # the plain way: solve 24 times; the mean is that of all photos
        hats = np.linalg.inv(scaled.T @ scaled + alpha * np.eye(20))
        full = scaled @ hats @ scaled.T + 1 / 72
        residual = centred - scaled @ hats @ scaled.T @ centred
        blocks = [slice(first, first + 3) for first in range(0, 72, 3)]
        left_out = [np.linalg.solve(np.eye(3) - full[block, block], residual[block]) for block in blocks]
        errors.append(np.square(np.concatenate(left_out)).mean())
        refitted = [_without(scaled, targets.numpy(), block, alpha) for block in blocks[:2]]
        assert np.allclose(left_out[:2], refitted)
    oracle = Ridge(alphas[int(np.argmin(errors))]).fit(scaled, targets.numpy())
    assert np.allclose(found[0][0].numpy() * features.std(0).numpy(), oracle.coef_)
    alone = ridge(features, targets, 1)
    assert alone is not None
    assert alone[0].norm() > found[0].norm()  # which lets a photo's other versions tell its target


def _without(features: np.ndarray, targets: np.ndarray, block: slice, alpha: float) -> np.ndarray:
    """Return the errors on some rows of what ridge regression learns from the others."""
    kept = np.ones(len(features), dtype=bool)
    kept[block] = False
    oracle = Ridge(alpha).fit(features[kept], targets[kept])
    return targets[block] - oracle.predict(features[block])


def test_sweep_takes_the_one_nearest_to_ridge_of_choices_that_do_as_well() -> None:
    tried = tuple(HeadChoice(lr, 0.05, ridge) for ridge in (False, True) for lr in (1e-5, 1e-3, 1e-1))
    losses = torch.tensor([[9.0, 0.40, 9.0, 9.0, 0.43, 0.42], [9.0, 0.50, 9.0, 9.0, 0.51, 0.52]])
    assert sweep._simplest(tried, losses) == 4  # 0.47 is within 0.45 ± 0.05, and nearer than 0.47 with a larger rate
    assert sweep._simplest(tried[:3], losses[:, :3]) == 1
    assert sweep._simplest(tried, losses + torch.tensor([0, 0, 0, 0, 0.2, 0.2])) == 1
    assert sweep._simplest(tried, losses + torch.tensor([0, 0, 0, 0, math.nan, 0])) == 5


def test_ridge_tells_classes_apart_and_is_no_surer_than_it_should_be() -> None:
    data = batches()
    (rows,), targets = data.pick(torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.int64))
    found = ridge(rows, targets, 3)
    assert found is not None
    scores = F.linear(rows.double(), *found)
    assert (scores.argmax(1) == targets).float().mean() > 0.85
    losses = {factor: float(F.cross_entropy(factor * scores, targets)) for factor in (0.3, 1.0)}
    assert losses[1.0] < losses[0.3]
    assert ridge(rows[:1], targets[:1], 3) is None


@pytest.mark.parametrize(
    ("live", "is_linear"),
    [
        (nn.Linear(WIDTH, 3), True),
        (nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, 3)), True),
        (nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(1)), False),
        (nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 3)), False),
        (nn.Linear(WIDTH, 3, bias=False), False),
    ],
)
def test_ridge_start_is_for_one_linear_layer(live: nn.Module, is_linear: bool) -> None:
    start = ridge_start(live, batches(), torch.arange(COUNT))
    assert (start is not None) == is_linear
    if start is not None:
        assert set(start) == {name for name, _ in live.named_parameters()}
    found = sweep_heads(live, batches(), F.cross_entropy, **options(may_start_from_ridge=True))
    assert found is not None
    assert any(choice.starts_from_ridge for choice in found.tried) == is_linear


def test_fit_starts_from_ridge_where_that_is_asked_for(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, 48)
    model = half_frozen()
    regraft.freeze(model)
    regraft.unfreeze(model, "fc")
    result, _ = run(photos, model, head="ridge", epochs=1, lr=1e-6)
    assert result.validation.accuracy is not None
    assert result.validation.accuracy > 0.9
    assert result.config.head == "ridge"
    with pytest.raises(ConfigError, match="head='ridge' needs a linear head"):
        run(photos, half_frozen(), head="ridge", cache=False)


def test_fit_chooses_both_unless_they_are_given(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, 48)

    def chosen(**given: Any) -> tuple[regraft.FitResult, Lines]:
        torch.manual_seed(0)
        model = half_frozen()
        regraft.freeze(model)
        regraft.unfreeze(model, "fc")
        return run(photos, model, **{"head": "steps", "optimizer": "adamw", "lr": None, **given})

    result, lines = chosen()
    assert "chosen     learning rate" in lines
    assert result.config.lr in sweep.RATES
    assert result.config.weight_decay in sweep.DECAYS
    values = {name: getattr(result.config, name) for name in ("lr", "weight_decay", "head")}
    assert values["head"] in ("given", "ridge")
    again, lines = chosen(**values)
    assert "chosen" not in lines
    assert [record.train_loss for record in again.history] == [record.train_loss for record in result.history]
    result, _ = chosen(weight_decay=0.3)
    assert result.config.weight_decay == 0.3
