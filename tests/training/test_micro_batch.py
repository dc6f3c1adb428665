"""A batch in parts is a step of the whole batch, whatever the loss; held against a loop over whole batches by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import regraft
from regraft.errors import DataError, RegraftError, RunError
from regraft.training.steps.micro_batch import Batch
from training.factories import Lines


class Limited(nn.Module):
    """A network for which there is no memory for more than `limit` samples at a time while it trains."""

    def __init__(self, limit: int, *layers: nn.Module) -> None:
        super().__init__()
        self.limit, self.net = limit, nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.net(x)


def contrastive(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compare all pairs of a batch. Source: supervised contrastive loss, https://arxiv.org/abs/2004.11362."""
    unit = F.normalize(outputs, dim=1)
    scores = (unit @ unit.T / 0.5).masked_fill(torch.eye(len(unit), dtype=torch.bool), -1e4).log_softmax(1)
    same = (targets[:, None] == targets) & ~torch.eye(len(unit), dtype=torch.bool)
    return -(scores * same).sum() / same.sum()


class Weighted(nn.CrossEntropyLoss):
    """A class of the user's own, of which nothing is known."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (super().forward(outputs, targets) + outputs.square().mean()).sqrt()


WEIGHT = torch.tensor([1.0, 5.0, 20.0])
LOSSES: dict[str, Any] = {
    "plain": nn.CrossEntropyLoss(),
    "weight": nn.CrossEntropyLoss(weight=WEIGHT),
    "weight and smoothing": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "a function": lambda outputs, targets: F.cross_entropy(outputs, targets, weight=WEIGHT),
    "nll": lambda outputs, targets: F.nll_loss(outputs.log_softmax(1), targets, weight=WEIGHT),
    "contrastive": contrastive,
    "own class": Weighted(weight=WEIGHT),
    "root of the mean": lambda outputs, targets: F.cross_entropy(outputs, targets).sqrt(),
}
BINARY: dict[str, Any] = {
    "positive weight": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 9.0, 2.0])),
    "weight of each sample": nn.BCEWithLogitsLoss(weight=torch.rand(16, 1)),
    "sum": nn.L1Loss(reduction="sum"),
    "largest": lambda outputs, targets: (outputs - targets).square().amax(),
}


def by_hand(model: nn.Module, batches: Any, loss: Any, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    steps, losses, count = epochs * len(batches), [], 0
    model.train()
    for _ in range(epochs):
        total = seen = 0.0
        for inputs, targets in batches:
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.zero_grad()
            value = loss(model(inputs), targets)
            value.backward()
            optimizer.step()
            total, seen, count = total + value.item() * len(inputs), seen + len(inputs), count + 1
        losses.append(total / seen)
    assert count == steps
    return losses


def compare(loss: Any, targets: torch.Tensor, limit: int, layers: list[nn.Module], atol: float = 1e-6) -> None:
    batches = list(zip(torch.randn(48, 6).split(16), targets.split(16), strict=True))
    short, whole = Limited(limit, *copy.deepcopy(layers)), Limited(99, *copy.deepcopy(layers))
    torch.manual_seed(3)
    expected = by_hand(whole, batches, loss, 2)
    options: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "optimizer": "sgd", "weight_decay": 0.0}
    found = regraft.fit(short, (batches, batches), loss=loss, schedule="constant", seed=3, **options)
    assert [record.train_loss for record in found.history] == pytest.approx(expected, rel=1e-6)
    if found.best_epoch == 2:
        for name, tensor in whole.state_dict().items():
            assert torch.allclose(short.state_dict()[name], tensor, atol=atol), name


@pytest.mark.parametrize("limit", [1, 5, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_fit_in_parts_takes_the_steps_of_whole_batches_for_classes(name: str, limit: int) -> None:
    compare(LOSSES[name], torch.randint(3, (48,)), limit, [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)])


@pytest.mark.parametrize("limit", [1, 6])
@pytest.mark.parametrize("name", BINARY)
def test_fit_in_parts_takes_the_steps_of_whole_batches_for_numbers(name: str, limit: int) -> None:
    compare(BINARY[name], torch.randint(2, (48, 3)).float(), limit, [nn.Linear(6, 3)])


def test_fit_in_parts_updates_running_statistics_once_for_each_part() -> None:
    model = Limited(4, nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    reference = copy.deepcopy(model)
    inputs, targets = torch.randn(8, 6), torch.arange(8) % 3
    regraft.fit(model, ([(inputs, targets)],) * 2, loss=LOSSES["weight"], epochs=1, lr=1e-9)
    assert model.net[1].num_batches_tracked == 2
    reference.train()
    for part in (inputs[:4], inputs[4:]):
        reference(part)
    assert torch.allclose(model.net[1].running_var, reference.net[1].running_var, atol=1e-6)


def test_fit_in_parts_draws_the_same_dropout_twice() -> None:
    """The loss sees the outputs that the gradients are of: with equal masks a step lowers it on those very outputs."""
    seen: list[torch.Tensor] = []

    class Noted(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            if self.training:
                seen.append(output.detach())
            return output

    model = Limited(4, Noted(0.5), nn.Linear(6, 3))
    batch = (torch.randn(8, 6), torch.arange(8) % 3)
    regraft.fit(model, ([batch], [batch]), loss=LOSSES["weight"], epochs=1, lr=1e-2)
    first, second, again, and_again = seen
    assert torch.equal(first, again)
    assert torch.equal(second, and_again)
    assert not torch.equal(first != 0, second != 0)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (7, 7), (5, 2), (1, 1), (9, 1)])
def test_batch_split_gives_parts_of_nearly_equal_sizes(count: int, size: int) -> None:
    numbers = torch.arange(count)
    parts = Batch(numbers, numbers, numbers).split(size)
    assert torch.equal(torch.cat([part.targets for part in parts]), numbers)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    if count > 1:
        assert min(map(len, Batch(numbers, numbers, numbers).split(size, min_size=2))) >= 2


NORMS: dict[str, list[nn.Module]] = {
    "BatchNorm1d": [nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)],
    "BatchNorm2d": [nn.Linear(6, 4), nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)],
    "two": [nn.BatchNorm1d(6), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)],
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("count", [9, 17])
def test_fit_leaves_out_a_last_batch_of_one_before_batch_norm(name: str, count: int) -> None:
    data, lines = TensorDataset(torch.randn(count, 6), torch.arange(count) % 2), Lines()
    model = nn.Sequential(*copy.deepcopy(NORMS[name]))
    result = regraft.fit(model, (DataLoader(data, 8), data), epochs=2, lr=1e-2, progress=lines)
    assert sum(line.startswith("left out   a batch of one photo") for line in lines.lines) == 2
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
    assert norm.num_batches_tracked == result.best_epoch * (count // 8)
    assert result.validation.count == count


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("how", ["option", "loader", "one sample"])
def test_fit_refuses_batches_of_one_before_batch_norm_before_training(name: str, how: str) -> None:
    count = 1 if how == "one sample" else 9
    data = TensorDataset(torch.randn(count, 6), torch.arange(count) % 2)
    train = DataLoader(data, 1) if how == "loader" else data
    model = nn.Sequential(*copy.deepcopy(NORMS[name]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RegraftError, match=r"batch norm cannot learn from one alone\. Use a batch_size of 2 or more"):
        regraft.fit(model, (train, data), epochs=1, batch_size=1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("is_frozen", [True, False])
def test_fit_learns_from_batches_of_one_where_the_network_can(is_frozen: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    data = TensorDataset(torch.randn(5, 3, 8, 8), torch.arange(5) % 2)
    if is_frozen:
        regraft.freeze(model, "0", "1")
    assert len(regraft.fit(model, (data, data), epochs=1, batch_size=1).history) == 1


@pytest.mark.parametrize("count", [8, 7])
def test_fit_never_learns_from_parts_of_one_before_batch_norm(count: int) -> None:
    data = [(torch.randn(count, 6), torch.arange(count) % 2)]
    model = Limited(3, *copy.deepcopy(NORMS["BatchNorm1d"]))
    sizes: list[int] = []
    model.net[1].register_forward_hook(lambda layer, _, output: sizes.append(len(output)) if layer.training else None)
    regraft.fit(model, (data, data), epochs=1)
    assert 1 not in sizes
    with pytest.raises(RunError, match="no memory for two photos, and batch norm cannot learn from one alone"):
        regraft.fit(Limited(1, *copy.deepcopy(NORMS["BatchNorm1d"])), (data, data), epochs=1)


def test_fit_says_what_a_norm_without_running_statistics_cannot_measure() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(9, 6), torch.arange(9) % 2)
    with pytest.raises((DataError, RegraftError), match="a single sample"):
        regraft.fit(model, (DataLoader(data, 8, drop_last=True), DataLoader(data, 8)), epochs=1)
