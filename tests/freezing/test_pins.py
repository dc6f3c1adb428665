"""A pin holds whatever is done to the model afterwards."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import tiny
from oracles import identical
from regraft import freeze, unfreeze
from regraft.freezing.pins import is_pinned

KEPT = ("bn1", "bn2")


@pytest.fixture
def frozen() -> nn.Module:
    model = tiny.build("plain")
    freeze(model, "conv*", "bn*")
    return model


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned_by_hand(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.training = True
    return model


SURVIVED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "train": lambda model: model.train(),
    "eval and train": lambda model: model.eval().train(),
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "torch.save": saved_and_loaded,
    "assignment by hand": assigned_by_hand,
    "state dict": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
    "half and back": lambda model: model.half().float(),
    "symbolic trace": fx.symbolic_trace,
    "apply": lambda model: model.apply(lambda module: module.train()),
}


@pytest.mark.parametrize("act", SURVIVED.values(), ids=list(SURVIVED))
def test_freeze_pins_survive(frozen: nn.Module, act: Callable[[nn.Module], nn.Module]) -> None:
    model = act(frozen)
    if act is not assigned_by_hand:
        model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(tiny.batch("plain"))
    for name, tensor in model.state_dict().items():
        assert identical(before[name], tensor), name
    for name in KEPT:
        assert not model.get_submodule(name).training
    assert model.dropout.training


def test_unfreeze_of_a_copy_leaves_the_original_pinned(frozen: nn.Module) -> None:
    copied = copy.deepcopy(frozen)
    unfreeze(frozen)
    frozen.train()
    copied.train()
    assert frozen.bn1.training
    assert not copied.bn1.training
    unfreeze(copied)
    copied.train()
    assert copied.bn1.training


@pytest.mark.parametrize("act", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_unfreeze_takes_what_was_copied(frozen: nn.Module, act: Callable[[nn.Module], nn.Module]) -> None:
    model = act(frozen)
    unfreeze(model)
    model.train()
    assert all(module.training for module in model.modules())
    assert not any(is_pinned(module) for module in model.modules())


def test_freeze_lets_export_take_pinned_layers_in_evaluation_mode(frozen: nn.Module) -> None:
    inputs = tiny.batch("plain")
    program = torch.export.export(frozen.eval(), (inputs,))
    assert torch.allclose(program.module()(inputs), frozen(inputs), atol=1e-6)


def test_freeze_keeps_statistics_in_an_export_in_training_mode(frozen: nn.Module) -> None:
    inputs = tiny.batch("plain")
    frozen.dropout.p = 0.0
    module = torch.export.export(frozen.train(), (inputs,)).module()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    reference = copy.deepcopy(frozen).eval()(inputs)
    assert torch.allclose(module(inputs), reference, atol=1e-6)
    assert all(identical(before[name], buffer) for name, buffer in module.named_buffers())


def test_freeze_leaves_no_dropout_in_a_symbolic_trace_of_a_frozen_block() -> None:
    model, inputs = tiny.build("functional-dropout"), tiny.batch("functional-dropout")
    freeze(model, "block1", "block2")
    traced = fx.symbolic_trace(model.train())
    assert identical(traced(inputs), traced(inputs))


def test_freeze_keeps_the_users_own_hooks() -> None:
    model, calls = tiny.build("plain"), []
    model.bn1.register_forward_pre_hook(lambda *_: calls.append(1))
    freeze(model)
    unfreeze(model)
    model(tiny.batch("plain"))
    assert calls == [1]
    assert len(model.bn1._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("layers", "patterns", "expected"),
    [
        ("frozen drop frozen train", ("0", "2"), [1]),
        ("frozen drop train", ("0",), []),
        ("drop frozen train", ("1",), [0]),
        ("train drop frozen", ("2",), []),
        ("frozen drop drop frozen train", ("0", "3"), [1, 2]),
        ("frozen drop frozen drop", (), [0, 1, 2, 3]),
    ],
)
def test_freeze_takes_a_layer_without_parameters_with_its_neighbours(
    layers: str, patterns: tuple[str, ...], expected: list[int]
) -> None:
    words = layers.split()
    model = nn.Sequential(*(nn.Dropout() if word == "drop" else nn.Linear(4, 4) for word in words))
    freeze(model, *patterns)
    model.train()
    dropped = [position for position, word in enumerate(words) if word == "drop" and not model[position].training]
    assert dropped == [position for position in expected if words[position] == "drop"]


def test_freeze_turns_dropout_off_before_a_block_that_opens_with_frozen_layers() -> None:
    blocks = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), blocks)
    freeze(model, until="2.2")
    model.train()
    assert [model[1].training, blocks[1].training, blocks[3].training] == [False, False, True]
    inputs = torch.randn(3, 4)
    front = nn.Sequential(*model[:2], *blocks[:3])
    assert identical(front(inputs), front(inputs))
