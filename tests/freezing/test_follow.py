"""An optimizer that goes on after an edit does what one would that was never interrupted."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import regraft
import tiny
from oracles import identical
from regraft.errors import ConfigError, SelectionError


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(tiny.batch("plain")).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_momentum_of_what_stays_goes_on(name: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    model = tiny.build("plain").eval()
    optimizer = regraft.build_optimizer(name, model, lr=0.01, weight_decay=0.1, **options)
    for _ in range(3):
        step(model, optimizer)
    state = copy.deepcopy(optimizer.state[model.conv1.weight])
    edited = regraft.replace_head(model, 3).eval()
    followed = regraft.follow(optimizer, model, edited)
    assert (followed.dropped, followed.added) == (2, ("fc.weight", "fc.bias"))
    assert all(
        identical(state[key], value)
        for key, value in optimizer.state[model.conv1.weight].items()
        if isinstance(value, torch.Tensor)
    )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in edited.parameters()}
    assert model.fc.weight not in optimizer.state
    before = edited.fc.weight.clone()
    step(edited, optimizer)
    assert not identical(before, edited.fc.weight)


def test_new_parameters_join_their_like_and_the_number_of_groups_stays() -> None:
    model = tiny.build("plain")
    optimizer = regraft.build_optimizer("adamw", model, lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    count = len(optimizer.param_groups)
    edited = regraft.append(model, nn.Linear(tiny.CLASSES, 4))
    regraft.follow(optimizer, model, edited)
    assert len(optimizer.param_groups) == count
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(edited.appended_1.weight)] == 0.1
    assert decays[id(edited.appended_1.bias)] == 0.0
    step(edited, optimizer)
    schedule.step()


def test_what_is_frozen_does_not_join() -> None:
    model = tiny.build("plain")
    optimizer = regraft.build_optimizer("sgd", model, lr=0.1)
    edited = regraft.append(model, nn.Linear(tiny.CLASSES, 4))
    regraft.freeze(edited, "appended_1")
    assert regraft.follow(optimizer, model, edited).added == ()


def test_an_optimizer_of_another_network_is_refused() -> None:
    model = tiny.build("plain")
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="holds no parameter of the network before the edit"):
        regraft.follow(other, model, regraft.replace_head(model, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edited = regraft.replace_head(model, 3)
    regraft.freeze(edited)
    held = [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(SelectionError, match="nothing of the edited network is trainable"):
        regraft.follow(optimizer, model, edited)
    assert all(a is b for a, b in zip(held[0], optimizer.param_groups[0]["params"], strict=True))
