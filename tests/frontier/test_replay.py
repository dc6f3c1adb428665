"""Networks whose forward cannot be traced: recorded up to the first live layer, and replayed from there."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from frontier.architectures import Scaled
from oracles import identical, same, snapshot
from regraft.errors import ModelError
from regraft.frontier import partition
from regraft.frontier.cache.key import network_digest
from regraft.frontier.replay import Recording


class WithSkip(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        scores = super().forward(x)
        return scores + h.mean()


class WithNoise(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.second(self.first(x)).mean((2, 3)), 0.5, self.training)
        return self.head(x) if float(x.sum()) > -1e9 else x


class WithToken(Scaled):
    """Adds a trainable number before its first live layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)).mean((2, 3)) + self.token
        return self.head(x) if float(x.sum()) > -1e9 else x


class Reused(Scaled):
    """Calls a frozen layer before and after its first live one, and the live one twice with a keyword."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.head(input=self.second(self.first(x)).mean((2, 3)))
        scores = scores + self.head(input=torch.cat([scores, scores], 1))
        image = scores.sum() * torch.ones(1, 3, 8, 8)
        return scores + self.first(image).mean() if float(scores.sum()) > -1e9 else scores


def frozen(model: nn.Module, *layers: str) -> nn.Module:
    regraft.freeze(model, *layers)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Scaled, Reused])
def test_partition_by_recording_gives_two_parts_that_are_the_whole(kind: type[nn.Module], training: bool) -> None:
    model = frozen(kind(), "first", "second").train(training)
    inputs = torch.randn(5, 3, 8, 8)
    before = snapshot(model)
    parts = partition(model, inputs[:1])
    assert same(before, snapshot(model))
    assert isinstance(parts.prefix, Recording)
    with torch.no_grad():
        kept = parts.prefix(inputs)
        torch.manual_seed(1)
        ours = parts.suffix(*kept)
        torch.manual_seed(1)
        assert identical(ours, model(inputs))
    assert same(before, snapshot(model))


def test_partition_by_recording_does_not_run_the_frozen_layers_again() -> None:
    model = frozen(Scaled(), "first", "second")
    parts = partition(model, torch.zeros(1, 3, 8, 8))
    assert [(cut.layer, cut.shape) for cut in parts.frontier] == [("drop", (4,))]
    kept = parts.prefix(torch.randn(4, 3, 8, 8))
    calls: list[Any] = []
    model.get_submodule("first.0").register_forward_hook(lambda *given: calls.append(given))
    parts.suffix(*kept).sum().backward()
    assert not calls
    assert model.get_parameter("head.weight").grad is not None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WithSkip, "takes more from before 'drop'"),
        (WithNoise, "draws at random or counts its calls before 'head'"),
        (WithToken, "not one row for each image"),
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_partition_by_recording_notices_what_else_is_taken_from_before(kind: type[nn.Module], message: str) -> None:
    model = frozen(kind(), "first", "second")
    before = snapshot(model)
    with pytest.raises(ModelError, match=message):
        partition(model, torch.zeros(1, 3, 8, 8))
    assert same(before, snapshot(model))


def test_network_digest_knows_the_constant_part_alone() -> None:
    model = frozen(Scaled(), "first", "second")
    digest = network_digest(partition(model, torch.zeros(1, 3, 8, 8)).prefix)
    nn.init.zeros_(model.get_parameter("head.weight"))
    assert network_digest(partition(model, torch.zeros(1, 3, 8, 8)).prefix) == digest
    nn.init.zeros_(model.get_parameter("second.weight"))
    assert network_digest(partition(model, torch.zeros(1, 3, 8, 8)).prefix) != digest
