from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as kinds

import tiny
from oracles import identical, same, snapshot
from regraft import Schedule, build_optimizer, freeze, param_groups
from regraft.errors import ConfigError, SelectionError
from regraft.freezing.schedule import Stage, add_trainable

EPOCHS_OF = {"head:2": 2, "head:3,layer4:5,all:10": 18, " fc : 1 , conv2+bn2:2 ": 3}


@pytest.mark.parametrize(("text", "epochs"), EPOCHS_OF.items())
def test_schedule_epochs_are_the_sum_of_the_stages(text: str, epochs: int) -> None:
    assert Schedule.parse(text).epochs == epochs


def test_schedule_parse_reads_stages_in_order_with_their_patterns() -> None:
    stages = Schedule.parse("head:3, layer4+type:BatchNorm2d:5,children[1:]:2").stages
    assert stages == (Stage(("head",), 3), Stage(("layer4", "type:BatchNorm2d"), 5), Stage(("children[1:]",), 2))


@pytest.mark.parametrize(
    "text",
    ["", "head", ":3", "head:", "head:0", "head:-1", "head:1.5", "head:three", "head:²", "head:3,", "head+:3", "+:1"],
)
def test_schedule_parse_refuses_what_is_no_schedule_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule.parse(text)
    assert f"in the schedule '{text}' is no stage" in str(caught.value)
    assert "Expected LAYERS:EPOCHS, as in 'head:3,layer4:5,all:10'." in str(caught.value)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def within(model: nn.Module, *layers: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{layer}." for layer in layers))}


def listed(optimizer: torch.optim.Optimizer) -> list[int]:
    return sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    loss = F.cross_entropy(model(tiny.batch("plain", seed=seed)), torch.arange(6) % tiny.CLASSES)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "head"), [("plain", "fc"), ("residual", "head"), ("sequential", "7")])
def test_schedule_head_is_the_classifier_whatever_its_name(name: str, head: str) -> None:
    model = tiny.build(name)
    Schedule.parse("head:1,all:1").start(model)
    assert trainable(model) == within(model, head)


def test_schedule_start_freezes_all_but_the_first_stage_whatever_was_frozen_before() -> None:
    model = tiny.build("plain")
    freeze(model, "fc")
    report = Schedule.parse("fc+bn2:1,all:1").start(model)
    assert trainable(model) == within(model, "fc", "bn2")
    assert report.frozen == sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("text", ["head:1,conv9:1", "conv9:1,all:1", "dropout:1,all:1", "head:1,dropout:1"])
def test_schedule_start_refuses_a_stage_that_selects_nothing_before_anything_changes(text: str) -> None:
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(SelectionError, match=r"no layer 'conv9' in PlainCnn|'dropout' selects no parameters"):
        Schedule.parse(text).start(model)
    assert same(before, snapshot(model))


def test_schedule_advance_lets_layers_join_with_the_first_epoch_of_their_stage() -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:2,conv2:1,all:2")
    schedule.start(model)
    optimizer = build_optimizer("sgd", model, lr=0.1, momentum=0.9)
    seen, changed = [], []
    for epoch in range(1, schedule.epochs + 1):
        report = schedule.advance(epoch, model, optimizer, lr=0.1)
        seen.append(trainable(model))
        changed.append(None if report is None else set(report.changed))
        assert listed(optimizer) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        step(model, optimizer, epoch)
    head, conv2, everything = within(model, "fc"), within(model, "conv2"), set(dict(model.named_parameters()))
    assert seen == [head, head, head | conv2, everything, everything]
    assert changed == [None, None, conv2, everything - head - conv2, None]


def test_schedule_advance_keeps_the_momentum_of_what_trains_already() -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:1,all:1")
    schedule.start(model)
    optimizer = build_optimizer("sgd", model, lr=0.1, momentum=0.9)
    step(model, optimizer, 1)
    buffers = {p: state["momentum_buffer"] for p, state in optimizer.state.items()}
    assert len(buffers) == 2
    bits = {p: buffer.clone() for p, buffer in buffers.items()}
    schedule.advance(2, model, optimizer, lr=0.1)
    assert optimizer.state.keys() == buffers.keys()
    for parameter, buffer in buffers.items():
        assert optimizer.state[parameter]["momentum_buffer"] is buffer
        assert identical(bits[parameter], buffer)
    step(model, optimizer, 2)
    assert optimizer.state.keys() == set(model.parameters())


def test_add_trainable_lets_a_parameter_join_once_and_by_identity() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in model:
        nn.init.zeros_(layer.bias)
    model[1].weight = model[0].weight
    freeze(model, "0")
    model[1].bias.requires_grad_(True)
    optimizer = build_optimizer("sgd", model, lr=0.1)
    model.requires_grad_(True)
    assert add_trainable(optimizer, param_groups(model, 0.1)) == 2
    assert add_trainable(optimizer, param_groups(model, 0.1)) == 0
    assert listed(optimizer) == sorted(map(id, model.parameters()))


RATES: dict[str, dict[str, Any]] = {
    "one rate": {},
    "backbone": {"backbone_lr": 0.02},
    "layer decay": {"layer_decay": 0.5},
    "layer decay, nothing spared": {"layer_decay": 0.5, "no_decay": ()},
}


@pytest.mark.parametrize("rates", RATES.values(), ids=list(RATES))
def test_schedule_rates_and_decays_are_those_of_param_groups_on_the_whole(rates: dict[str, Any]) -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:1,conv2+bn2:1,all:1")
    expected = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in param_groups(model, 0.1, 0.3, **rates)
        for parameter in group["params"]
    }
    schedule.start(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.1, 0.3, **rates), lr=0.1, momentum=0.9)
    for epoch in (1, 2, 3):
        schedule.advance(epoch, model, optimizer, lr=0.1, weight_decay=0.3, **rates)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == expected
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


@pytest.mark.parametrize("rates", [{}, {"backbone_lr": 0.02}, {"layer_decay": 0.5}], ids=["one", "backbone", "decay"])
def test_schedule_advance_goes_on_with_a_running_learning_rate_for_old_and_new_groups(rates: dict[str, float]) -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:2,conv2:2,all:3")
    base = {id(p): group["lr"] for group in param_groups(model, 0.1, 0.3, **rates) for p in group["params"]}
    schedule.start(model)
    optimizer = build_optimizer("sgd", model, lr=0.1, weight_decay=0.3, momentum=0.9, **rates)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 7)
    for epoch in range(1, 8):
        schedule.advance(epoch, model, optimizer, scheduler=falling, lr=0.1, weight_decay=0.3, **rates)
        factor = 1 - (epoch - 1) / 7
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["lr"] == pytest.approx(base[id(parameter)] * factor, abs=1e-12)
        step(model, optimizer, epoch)
        falling.step()
    assert len(falling.base_lrs) == len(falling.lr_lambdas) == len(optimizer.param_groups)
    assert falling.get_last_lr() == pytest.approx([0.0] * len(optimizer.param_groups), abs=1e-12)


def test_schedule_advance_equals_a_loop_written_by_hand() -> None:
    ours, schedule = tiny.build("plain"), Schedule.parse("head:2,conv2+bn2:2,all:2")
    ours.dropout.p = 0.0
    schedule.start(ours)
    optimizer = build_optimizer("sgd", ours, lr=0.05, weight_decay=0.1, momentum=0.9)
    for epoch in range(1, schedule.epochs + 1):
        schedule.advance(epoch, ours, optimizer, lr=0.05, weight_decay=0.1)
        step(ours, optimizer, epoch)

    theirs = tiny.build("plain")
    theirs.dropout.p = 0.0
    decayed = [theirs.conv1.weight, theirs.conv2.weight, theirs.fc.weight]
    joins = {theirs.conv2: 3, theirs.bn2: 3, theirs.conv1: 5, theirs.bn1: 5}
    theirs.requires_grad_(False)
    theirs.fc.requires_grad_(True)
    by_hand = torch.optim.SGD([theirs.fc.weight, theirs.fc.bias], lr=0.05, momentum=0.9)
    by_hand.param_groups.clear()
    by_hand.add_param_group({"params": [theirs.fc.weight], "weight_decay": 0.1})
    by_hand.add_param_group({"params": [theirs.fc.bias], "weight_decay": 0.0})
    for epoch in range(1, 7):
        theirs.train()
        for layer, first in joins.items():
            if epoch < first:
                layer.eval()
            elif epoch == first:
                for parameter in layer.parameters():
                    parameter.requires_grad_(True)
                    decay = 0.1 if any(parameter is weight for weight in decayed) else 0.0
                    by_hand.add_param_group({"params": [parameter], "weight_decay": decay})
        loss = F.cross_entropy(theirs(tiny.batch("plain", seed=epoch)), torch.arange(6) % tiny.CLASSES)
        by_hand.zero_grad()
        loss.backward()
        by_hand.step()
    for name, tensor in theirs.state_dict().items():
        assert identical(tensor, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    ],
    ids=["cosine", "step", "exponential"],
)
def test_schedule_advance_goes_on_with_other_schedules_of_rates(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:3,all:2")
    schedule.start(model)
    optimizer = build_optimizer("sgd", model, lr=0.1, backbone_lr=0.01)
    running = make(optimizer)
    for epoch in range(1, 6):
        schedule.advance(epoch, model, optimizer, scheduler=running, lr=0.1, backbone_lr=0.01)
        step(model, optimizer, epoch)
        running.step()
        head, *backbone = (group["lr"] for group in optimizer.param_groups)
        assert backbone == pytest.approx([head / 10] * len(backbone))
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
    ids=["one cycle", "plateau"],
)
def test_schedule_advance_refuses_a_schedule_of_rates_that_cannot_grow(
    make: Callable[[torch.optim.Optimizer], Any],
) -> None:
    model, schedule = tiny.build("plain"), Schedule.parse("head:1,all:1")
    schedule.start(model)
    optimizer = build_optimizer("sgd", model, lr=0.1, momentum=0.9)
    running, groups = make(optimizer), len(optimizer.param_groups)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ConfigError, match="cannot join the rates"):
        schedule.advance(2, model, optimizer, scheduler=running, lr=0.1)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert len(optimizer.param_groups) == groups


def test_schedule_advance_gives_the_flags_back_where_the_rates_contradict_each_other() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    schedule = Schedule.parse("head:1,all:2")
    schedule.start(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ConfigError, match="layer_decay and backbone_lr exclude each other"):
        schedule.advance(2, model, optimizer, lr=1.0, layer_decay=0.5, backbone_lr=0.1)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert len(optimizer.param_groups) == 1


CLOSED = {
    "SequentialLR": lambda o: kinds.SequentialLR(o, [kinds.ConstantLR(o), kinds.StepLR(o, 1)], [2]),
    "ReduceLROnPlateau": kinds.ReduceLROnPlateau,
    "OneCycleLR": lambda o: kinds.OneCycleLR(o, 1.0, total_steps=9),
    "CyclicLR": lambda o: kinds.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
    "ChainedScheduler": lambda o: kinds.ChainedScheduler([kinds.StepLR(o, 1)], optimizer=o),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.1),
}
OPEN = {
    "LambdaLR": lambda o: kinds.LambdaLR(o, lambda epoch: 0.5),
    "MultiplicativeLR": lambda o: kinds.MultiplicativeLR(o, lambda epoch: 0.5),
    "StepLR": lambda o: kinds.StepLR(o, 1),
    "CosineAnnealingLR": lambda o: kinds.CosineAnnealingLR(o, 9),
    "LinearLR": kinds.LinearLR,
}


@pytest.mark.parametrize("kind", CLOSED)
def test_schedule_advance_refuses_what_new_groups_cannot_join_before_anything_is_thawed(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    schedule = Schedule.parse("head:1,all:2")
    schedule.start(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scheduler = CLOSED[kind](optimizer)
    with pytest.raises(ConfigError, match=f"new layers cannot join the rates of a running {kind}"):
        schedule.advance(2, model, optimizer, scheduler=scheduler, lr=1.0, backbone_lr=0.1)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", OPEN)
def test_schedule_advance_keeps_the_rates_of_new_groups_in_proportion(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    schedule = Schedule.parse("head:1,all:2")
    schedule.start(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    scheduler = OPEN[kind](optimizer)
    schedule.advance(2, model, optimizer, scheduler=scheduler, lr=1.0, backbone_lr=0.1)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    head, backbone = (group["lr"] for group in optimizer.param_groups)
    assert backbone == pytest.approx(0.1 * head)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("'re:a{1,2}':3,all:1", [(("re:a{1,2}",), 3), (("all",), 1)]),
        ("head+'re:b+[,]':2", [(("head", "re:b+[,]"), 2)]),
        ('"re:x:1,y":2', [(("re:x:1,y",), 2)]),
        ("head+re:layer4:2", [(("head", "re:layer4"), 2)]),
    ],
)
def test_schedule_parse_reads_regular_expressions_in_quotes(
    text: str, stages: list[tuple[tuple[str, ...], int]]
) -> None:
    assert [(stage.patterns, stage.epochs) for stage in Schedule.parse(text).stages] == stages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("re:a{1,2}:3", "A regular expression with a comma needs quotes"),
        ("re:blocks[.][0-9]+:3", "has a + after a regular expression"),
        ("re:a+head:3", "Put the expression in quotes"),
        ("'':3", "is no stage"),
    ],
)
def test_schedule_parse_refuses_regular_expressions_that_can_be_read_in_two_ways(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule.parse(text)
    assert message in str(caught.value)
