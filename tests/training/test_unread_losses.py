"""Steps that a GPU is given before anybody reads the loss of the last: the CPU runs the same code here."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from regraft.errors import LossError
from regraft.training.loop import train_epoch
from regraft.training.steps.compute import ComputeContext
from regraft.training.steps.tally import Tally

CPU = ComputeContext(torch.device("cpu"))


def steps(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(tiny.batch("plain", 5, seed), torch.arange(5) % tiny.CLASSES) for seed in range(count)]


def run(
    model: nn.Module, batches: Any, *, guarded: bool, loss: Any = F.cross_entropy, tally: Tally | None = None
) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = CPU.step_guard() if guarded else CPU.scaler()
    return train_epoch(model, batches, loss, optimizer, schedule, scaler, CPU, tally=tally)


def test_train_epoch_takes_the_same_steps_whether_it_reads_each_loss_or_not() -> None:
    model = tiny.build("plain")
    other = copy.deepcopy(model)
    tally = Tally()
    torch.manual_seed(0)
    found = run(model, steps(), guarded=True, tally=tally)
    torch.manual_seed(0)
    expected = run(other, steps(), guarded=False)
    assert found == expected
    assert (tally.steps, tally.count) == (6, 30)
    assert not tally.unread
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_train_epoch_finds_a_loss_that_is_not_finite_though_it_reads_it_later(bad: int) -> None:
    """The weights stay finite, as the device leaves the step out, and the error names the step."""
    model, calls = tiny.build("plain"), [0]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return F.cross_entropy(outputs, targets) * (math.nan if calls[0] - 1 == bad else 1.0)

    with pytest.raises(LossError, match=rf"the loss is nan at step {bad + 1} of this epoch .*it is the loss itself"):
        run(model, steps(), guarded=True, loss=loss)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert calls[0] <= bad + 3 + 1  # two more steps at most


def test_train_epoch_reads_all_losses_before_a_state_is_saved() -> None:
    tally = Tally()
    model = tiny.build("plain")
    seen: list[dict[str, Any]] = []

    def batches() -> Any:
        for number, batch in enumerate(steps()):
            yield batch
            seen.append({"unread": len(tally.unread), **tally.to_tree()})
            assert seen[-1]["count"] == 5 * (number + 1)

    run(model, batches(), guarded=True, tally=tally)
    assert [entry["steps"] for entry in seen] == [1, 2, 3, 4, 5, 6]
    assert max(entry["unread"] for entry in seen) == 1
