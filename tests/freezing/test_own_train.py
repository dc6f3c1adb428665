"""Networks that override `train` and `eval`, or carry one of their own."""

import pytest
import torch
from torch import nn

from freezing.layers_with_state import image
from oracles import identical
from regraft import freeze, unfreeze


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.seen: list[object] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x)


class MoreArguments(Own):
    def train(self, mode: bool = True, *, option: int = 0) -> str:
        self.seen.append((mode, option))
        super().train(mode)
        return "trained"


class ReturnsNothing(Own):
    def train(self, mode: bool = True) -> None:
        super().train(mode)


class AlwaysTrains(Own):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class TakesNothing(Own):
    def train(self) -> nn.Module:
        return super().train(True)


class EvalDoesNothing(Own):
    def eval(self) -> None:
        return None


@pytest.mark.parametrize("kind", [MoreArguments, ReturnsNothing, AlwaysTrains, TakesNothing, EvalDoesNothing])
def test_freeze_pins_hold_where_train_is_overridden(kind: type[Own]) -> None:
    layer = kind()
    freeze(layer)
    before = layer.bn.running_mean.clone()
    layer.train()
    layer(image())
    assert identical(before, layer.bn.running_mean)
    unfreeze(layer)
    layer.train()
    layer(image())
    assert not identical(before, layer.bn.running_mean)


def test_freeze_pins_pass_arguments_and_results_of_train_on() -> None:
    model = nn.Sequential(MoreArguments(), nn.Conv2d(3, 2, 1))
    freeze(model, "0")
    assert model[0].train(True, option=5) == "trained"
    assert model[0].train(mode=True, option=6) == "trained"
    assert model[0].seen == [(False, 5), (False, 6)]


def test_freeze_calls_a_train_that_was_put_on_one_layer_and_unfreeze_gives_it_back() -> None:
    model, seen = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), []

    def own(mode: bool = True, **options: int) -> nn.Module:
        seen.append((mode, options))
        return nn.Module.train(model[0], mode)

    model[0].train = own
    freeze(model, "0")
    model[0].train(True, steps=1)
    assert (seen, model[0].training) == ([(False, {"steps": 1})], False)
    unfreeze(model)
    assert model[0].train is own
