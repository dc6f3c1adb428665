import pytest
import torch
from torch import nn

import tiny
from oracles import same, snapshot
from regraft import freeze, freeze_state, unfreeze
from regraft.freezing.pins import is_pinned


@pytest.fixture
def mixed() -> nn.Module:
    """Return a network with frozen, pinned, half-frozen, evaluating and training layers."""
    model = tiny.build("plain").train()
    freeze(model, "conv1", "bn1")
    model.fc.bias.requires_grad_(False)
    model.bn2.eval()
    return model


ACTS = {
    "freeze everything": freeze,
    "thaw everything": unfreeze,
    "freeze up to a layer": lambda model: freeze(model, until="bn2"),
    "evaluate": lambda model: model.eval(),
    "train": lambda model: model.train(),
    "flags by hand": lambda model: model.requires_grad_(False),
    "modes by hand": lambda model: [setattr(layer, "training", True) for layer in model.modules()],
    "nested": lambda model: nested(model),
}


def nested(model: nn.Module) -> None:
    with freeze_state(model):
        freeze(model)
        model.eval()
    unfreeze(model, "conv1")


@pytest.mark.parametrize("act", ACTS.values(), ids=list(ACTS))
def test_freeze_state_puts_flags_pins_and_modes_back(mixed: nn.Module, act: object) -> None:
    before, pinned = snapshot(mixed), [is_pinned(layer) for layer in mixed.modules()]
    with freeze_state(mixed):
        act(mixed)
    assert same(before, snapshot(mixed))
    assert [is_pinned(layer) for layer in mixed.modules()] == pinned


def act_and_fail(model: nn.Module, act: object) -> None:
    with freeze_state(model):
        act(model)
        raise KeyError("halfway")


@pytest.mark.parametrize("act", ACTS.values(), ids=list(ACTS))
def test_freeze_state_lets_an_exception_pass_and_puts_all_back(mixed: nn.Module, act: object) -> None:
    before = snapshot(mixed)
    with pytest.raises(KeyError, match="halfway"):
        act_and_fail(mixed, act)
    assert same(before, snapshot(mixed))


def test_freeze_state_leaves_what_was_pinned_before_pinned(mixed: nn.Module) -> None:
    with freeze_state(mixed):
        unfreeze(mixed)
    mixed.train()
    before = mixed.bn1.running_mean.clone()
    mixed(tiny.batch("plain"))
    assert torch.equal(before, mixed.bn1.running_mean)
    assert mixed.bn2.training


def test_freeze_state_lets_what_was_not_pinned_before_follow_train_again() -> None:
    model = tiny.build("plain")
    with freeze_state(model):
        freeze(model)
    model.train()
    assert all(layer.training for layer in model.modules())


def test_freeze_state_leaves_new_layers_as_they_are_and_passes_over_lost_ones(mixed: nn.Module) -> None:
    lost = mixed.fc
    with freeze_state(mixed):
        mixed.fc = nn.Linear(lost.in_features, 2).requires_grad_(False).eval()
    assert not mixed.fc.weight.requires_grad
    assert not mixed.fc.training
    assert lost.weight.requires_grad
    assert not lost.bias.requires_grad


def test_freeze_state_leaves_an_untouched_model_as_it_is(mixed: nn.Module) -> None:
    before = snapshot(mixed)
    with freeze_state(mixed):
        pass
    assert same(before, snapshot(mixed))


def test_freeze_state_can_be_put_back_more_than_once(mixed: nn.Module) -> None:
    before = snapshot(mixed)
    with freeze_state(mixed) as state:
        for act in (freeze, unfreeze):
            act(mixed)
            state.put_back()
            assert same(before, snapshot(mixed))
