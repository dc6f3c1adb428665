"""An optimizer that goes on after an edit does what one would that was never interrupted.

The oracle is a loop of SGD and of AdamW written out here, with a momentum of its own for each parameter.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import regraft
import tiny
from oracles import identical
from regraft.errors import ArgumentError, ConfigError, SelectionError

RATE, DECAY = 0.01, 0.1
Update = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], float], torch.Tensor]


def sgd(value: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], decay: float) -> torch.Tensor:
    """Momentum 0.9, as in Sutskever et al. 2013 with torch's convention."""
    gradient = gradient + decay * value
    state["momentum"] = gradient if not state else 0.9 * state["momentum"] + gradient
    return value - RATE * state["momentum"]


def adamw(value: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], decay: float) -> torch.Tensor:
    """Algorithm 2 of Loshchilov and Hutter 2019."""
    value = value - RATE * decay * value
    state["step"] = step = state.get("step", 0) + 1
    state["first"] = 0.9 * state.get("first", 0) + 0.1 * gradient
    state["second"] = 0.999 * state.get("second", 0) + 0.001 * gradient**2
    first, second = state["first"] / (1 - 0.9**step), state["second"] / (1 - 0.999**step)
    return value - RATE * first / (second.sqrt() + 1e-8)


UPDATES: dict[str, tuple[Update, dict[str, Any]]] = {"sgd": (sgd, {"momentum": 0.9}), "adamw": (adamw, {})}
EDITS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replace_head": lambda model: regraft.replace_head(model, 3),
    "append": lambda model: regraft.append(model, nn.BatchNorm1d(tiny.CLASSES), nn.Linear(tiny.CLASSES, 4)),
    "truncate": lambda model: regraft.truncate(model, after="bn2"),
    "replace_stem": lambda model: regraft.replace_stem(model, 1),
    "remove": lambda model: regraft.remove(model, "bn1"),
}


def backward(model: nn.Module, seed: int, channels: int = 3) -> None:
    model.zero_grad()
    model(tiny.batch("plain", seed=seed)[:, :channels]).square().mean().backward()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", UPDATES)
def test_follow_takes_the_steps_of_a_loop_written_by_hand_before_and_after_an_edit(name: str, edit: str) -> None:
    update, options = UPDATES[name]
    model = tiny.build("plain").eval().double()
    optimizer = regraft.build_optimizer(name, model, lr=RATE, weight_decay=DECAY, **options)
    edited: nn.Module | None = None
    values: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    for epoch in range(6):
        if epoch == 3:
            before = dict(model.named_parameters())
            edited = EDITS[edit](model).eval().double()
            regraft.follow(optimizer, model, edited)
            for key, parameter in edited.named_parameters():
                if parameter is not before.get(key):  # what is new begins without a momentum
                    values.pop(key, None)
                    states.pop(key, None)
        network = model if edited is None else edited
        network.zero_grad()
        images = tiny.batch("plain", seed=epoch).double()
        network(images[:, : 1 if edit == "replace_stem" and epoch >= 3 else 3]).square().mean().backward()
        for key, parameter in network.named_parameters():
            decay = DECAY if parameter.ndim > 1 else 0.0
            value = values.get(key, parameter.detach().clone())
            assert parameter.grad is not None
            values[key] = update(value, parameter.grad, states.setdefault(key, {}), decay)
        optimizer.step()
        for key, parameter in network.named_parameters():
            assert torch.allclose(parameter, values[key], rtol=1e-9, atol=1e-12), (epoch, key)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "timm/lamb"])
def test_follow_keeps_the_state_tensors_of_what_stays_and_drops_the_rest(name: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    model = tiny.build("plain").eval()
    optimizer = regraft.build_optimizer(name, model, lr=RATE, weight_decay=DECAY, **options)
    backward(model, 0)
    optimizer.step()
    state = {key: dict(values) for key, values in optimizer.state.items()}
    edited = regraft.replace_head(model, 3).eval()
    followed = regraft.follow(optimizer, model, edited)
    assert followed.dropped == followed.added == ("fc.weight", "fc.bias")
    assert followed.kept == len(list(model.parameters())) - 2
    assert str(followed) == "2 parameters dropped, 2 added (fc.weight, fc.bias), 6 kept with their state"
    assert set(optimizer.state) == set(state) - {model.fc.weight, model.fc.bias}
    for parameter, values in optimizer.state.items():
        assert all(values[key] is value for key, value in state[parameter].items())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in edited.parameters()}
    assert len(held) == len(list(edited.parameters()))
    assert regraft.audit(edited, optimizer) == []
    before = edited.fc.weight.clone()
    backward(edited, 1)
    optimizer.step()
    assert not identical(before, edited.fc.weight)


def test_follow_puts_new_parameters_with_their_like_and_schedules_go_on() -> None:
    model = tiny.build("plain")
    optimizer = regraft.build_optimizer("adamw", model, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=10)
    count = len(optimizer.param_groups)
    edited = regraft.append(model, nn.Linear(tiny.CLASSES, 4))
    regraft.follow(optimizer, model, edited)
    assert len(optimizer.param_groups) == count
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(edited.appended_1.weight)] == DECAY
    assert decays[id(edited.appended_1.bias)] == 0.0
    backward(edited, 0)
    optimizer.step()
    schedule.step()


def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("by", [{"layer_decay": 0.5}, {"backbone_lr": RATE / 10}])
@pytest.mark.parametrize("name", ["plain", "residual"])
def test_follow_gives_what_is_new_the_rate_of_what_it_replaced_or_of_the_head(name: str, by: dict[str, float]) -> None:
    model = tiny.build(name)  # the head of `residual` is registered first
    optimizer = regraft.build_optimizer("adamw", model, lr=RATE, weight_decay=DECAY, **by)
    before = rates(optimizer)
    stem = model.conv1 if name == "plain" else model.stem
    edited = regraft.append(regraft.replace_stem(regraft.replace_head(model, 3), 1), nn.Linear(3, 2))
    regraft.follow(optimizer, model, edited)
    after = rates(optimizer)
    head = edited.fc if name == "plain" else edited.head
    assert after[id((edited.conv1 if name == "plain" else edited.stem).weight)] == before[id(stem.weight)]
    for layer in (head, edited.appended_1):
        assert (after[id(layer.weight)], after[id(layer.bias)]) == ((RATE, DECAY), (RATE, 0.0))


def test_follow_gives_a_layer_inside_of_another_the_rate_of_its_neighbours() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.5}]
    )
    edited = regraft.replace(model, "0.1", nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)))
    followed = regraft.follow(optimizer, model, edited)
    assert followed.added == ("0.1.0.weight", "0.1.1.weight", "0.1.1.bias")
    assert {rates(optimizer)[id(p)][0] for p in edited[0].parameters()} == {0.1}


@pytest.mark.parametrize("kind", ["step", "lambda", None])
def test_follow_lets_rates_of_their_own_join_the_schedule_where_it_stands(kind: str | None) -> None:
    model = tiny.build("plain")
    optimizer = regraft.build_optimizer("sgd", model, lr=RATE, weight_decay=DECAY, momentum=0.7)
    optimizer.defaults["momentum"] = 0.0
    makers: dict[str | None, Callable[[], Any]] = {
        "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        None: lambda: None,
    }
    schedule = makers[kind]()
    count = len(optimizer.param_groups)
    if schedule is not None:
        optimizer.step()
        schedule.step()
    edited = regraft.replace_head(model, 3)
    regraft.follow(optimizer, model, edited, lr=1.0, weight_decay=0.3, scheduler=schedule)
    factor = 1.0 if kind is None else 0.5
    assert rates(optimizer)[id(edited.fc.weight)] == (factor, 0.3)
    assert rates(optimizer)[id(edited.fc.bias)] == (factor, 0.0)
    assert len(optimizer.param_groups) == count + 2
    assert all(group["momentum"] == 0.7 for group in optimizer.param_groups)
    if schedule is not None:
        optimizer.step()
        schedule.step()
        assert rates(optimizer)[id(edited.fc.weight)][0] == pytest.approx(0.25)


def test_follow_tells_optimizers_that_know_names_the_new_ones() -> None:
    model = tiny.build("plain")
    for options in ({}, {"lr": 0.5}):
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=RATE)
        edited = regraft.replace_head(model, 3)
        regraft.follow(optimizer, model, edited, **options)
        named = dict(edited.named_parameters())
        for group in optimizer.param_groups:
            assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_follow_leaves_out_what_is_frozen_and_what_the_optimizer_was_not_given() -> None:
    model = tiny.build("plain")
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=RATE)
    edited = regraft.append(model, nn.Linear(tiny.CLASSES, 4))
    regraft.freeze(edited, "appended_1")
    followed = regraft.follow(optimizer, model, edited)
    assert (followed.added, followed.dropped, followed.kept) == ((), (), 2)
    assert str(followed) == "0 parameters dropped, 0 added, 2 kept with their state"


def test_follow_keeps_what_belongs_to_no_network() -> None:
    model, temperature = tiny.build("plain"), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=RATE)
    regraft.follow(optimizer, model, regraft.replace_head(model, 3))
    assert any(temperature is p for p in optimizer.param_groups[0]["params"])


Case = tuple[type[Exception], str, dict[str, Any]]
REFUSED: dict[str, Case] = {
    "foreign": (ConfigError, "this SGD holds no parameter of the network before the edit", {}),
    "lbfgs": (ConfigError, "LBFGS keeps one history for all parameters together", {}),
    "frozen": (SelectionError, "nothing of the edited network is trainable", {}),
    "rate": (ConfigError, "lr is -1.0, expected a number from 0 up", {"lr": -1.0}),
    "decay": (ArgumentError, "weight_decay is nan", {"weight_decay": float("nan")}),
    "schedule": (ConfigError, "cannot join the rates of a running OneCycleLR", {"lr": 0.1}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_follow_refuses_what_it_cannot_follow_and_changes_nothing(name: str) -> None:
    error, message, options = REFUSED[name]
    model = tiny.build("plain").eval()
    parameters = nn.Linear(2, 2).parameters() if name == "foreign" else model.parameters()
    kind = torch.optim.LBFGS if name == "lbfgs" else torch.optim.SGD
    optimizer = kind(parameters, lr=RATE, **({} if name == "lbfgs" else {"momentum": 0.9}))
    if name == "schedule":
        options = {**options, "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=9)}
    edited = regraft.replace_head(model, 3)
    if name == "frozen":
        regraft.freeze(edited)
    groups = [dict(group) | {"params": list(group["params"])} for group in optimizer.param_groups]
    state = copy.copy(dict(optimizer.state))
    with pytest.raises(error) as caught:
        regraft.follow(optimizer, model, edited, **options)
    assert message in str(caught.value)
    assert error is ArgumentError or str(caught.value).endswith("Nothing was changed.")
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert dict(optimizer.state) == state
