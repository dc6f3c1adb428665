"""Frozen is bit-identical, trainable moves, and nothing else about a model is other than before."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

import tiny
from oracles import identical, same, snapshot
from regraft import freeze, select, unfreeze
from regraft.errors import ModelError, SelectionError
from regraft.training.loop import main_output

STEPS = 3


def train(model: nn.Module, inputs: torch.Tensor, steps: int = STEPS) -> None:
    """Train by hand, without anything of regraft, and with an optimizer that would move whatever it is given."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        model.train()
        outputs = model(inputs + step)
        scores = outputs if isinstance(outputs, tuple) else (outputs,)
        targets = torch.arange(len(inputs)) % 2
        loss = sum(F.cross_entropy(score, targets) for score in scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_only_moved(model: nn.Module, before: dict[str, torch.Tensor], still: Callable[[str], bool]) -> None:
    """Assert that exactly the tensors whose names are not `still` have changed."""
    for name, tensor in model.state_dict().items():
        if still(name):
            assert identical(before[name], tensor), f"{name} has drifted"
        else:
            assert not identical(before[name], tensor), f"{name} has not moved"


TINY_CASES = {
    "plain": (("conv1", "bn1", "conv2", "bn2"), ("conv1.", "bn1.", "conv2.", "bn2.")),
    "residual": (("stem", "stem_norm", "body.second"), ("stem.", "stem_norm.", "body.second.")),
    "root-token": (("patches", "block"), ("patches.", "block.")),
    "aux-head": (("conv", "bn"), ("conv.", "bn.")),
    "tied": (("norm",), ("norm.",)),
    "functional-dropout": (("block1",), ("block1.",)),
    "sequential": (("children[:3]",), ("0.", "1.")),
}


@pytest.mark.parametrize("name", TINY_CASES)
def test_freeze_keeps_what_is_frozen_bit_identical_while_the_rest_moves(name: str) -> None:
    patterns, prefixes = TINY_CASES[name]
    model = tiny.build(name)
    freeze(model, *patterns)
    before = tensors(model)
    train(model, tiny.batch(name))
    assert_only_moved(model, before, lambda tensor: tensor.startswith(prefixes))


@pytest.mark.parametrize(
    ("name", "until", "trained"),
    [
        ("resnet18", "layer3", ("layer4", "fc")),
        ("mobilenet_v2", "features.17", ("features.18", "classifier")),
        ("timm/test_vit", "blocks.2", ("blocks.3", "blocks.4", "blocks.5", "norm.", "head.")),
    ],
)
def test_freeze_until_keeps_real_networks_bit_by_bit(name: str, until: str, trained: tuple[str, ...]) -> None:
    library = name.removeprefix("timm/")
    model = timm.create_model(library, num_classes=4) if library != name else models.get_model(name, num_classes=4)
    side = model.pretrained_cfg["input_size"][-1] if library != name else 64
    freeze(model, until=until)
    before = tensors(model)
    train(model, torch.randn(4, 3, side, side), steps=2)
    assert_only_moved(model, before, lambda tensor: not tensor.startswith(trained))


@pytest.mark.parametrize("until", ["conv", "between", "conv2"])
def test_freeze_keeps_statistics_without_parameters_in_the_frozen_front_from_drifting(until: str) -> None:
    model = tiny.build("input-norm")
    freeze(model, until=until)
    before = tensors(model)
    train(model, tiny.batch("input-norm"))
    assert_only_moved(model, before, lambda name: not name.startswith("fc." if until == "conv2" else ("conv2.", "fc.")))


def test_freeze_lets_statistics_between_trainable_layers_be_learned() -> None:
    model = tiny.build("input-norm")
    freeze(model, "fc")
    before = tensors(model)
    train(model, tiny.batch("input-norm"))
    assert_only_moved(model, before, lambda name: name.startswith("fc."))


def test_freeze_lets_statistics_at_the_opening_of_a_trainable_head_be_learned() -> None:
    head = nn.Sequential(nn.BatchNorm1d(12, affine=False), nn.Linear(12, 2))
    model = nn.Sequential(nn.Linear(12, 12), head)
    freeze(model, "0")
    model.train()
    assert head[0].training


def test_freeze_until_equals_freezing_the_first_layers_by_hand() -> None:
    ours, by_hand = models.resnet18(), models.resnet18()
    freeze(ours, until="layer3.0")
    frozen = [*list(by_hand.children())[:6], by_hand.layer3[0]]
    for layer in frozen:
        for parameter in layer.parameters():
            parameter.requires_grad = False
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in by_hand.named_parameters()
    }
    ours.train()
    held = {id(module) for layer in [*list(ours.children())[:6], ours.layer3[0]] for module in layer.modules()}
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (id(module) not in held)


@pytest.mark.parametrize("last", range(len(tiny.Residual.execution)))
def test_freeze_until_and_unfreeze_since_follow_the_execution_order(last: int) -> None:
    model = tiny.build("residual")
    executed = tiny.Residual.execution
    freeze(model, until=executed[last])
    frozen = {name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(executed[: last + 1])
    freeze(model)
    unfreeze(model, since=executed[last])
    thawed = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert thawed == set(executed[last:])


def test_freeze_until_a_container_that_is_never_called_ends_with_its_last_layer() -> None:
    model = tiny.build("residual")
    freeze(model, until="body")
    frozen = {name.rpartition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "stem_norm", "body.second", "body.first"}


def test_freeze_until_includes_the_parameters_of_the_root_that_were_used_before() -> None:
    model = tiny.build("root-token")
    freeze(model, until="block")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_freeze_until_a_layer_that_is_never_executed_is_an_error_that_changes_nothing() -> None:
    model = tiny.build("aux-head")
    before = snapshot(model)
    with pytest.raises(SelectionError, match="layer 'aux' of AuxHead is never executed"):
        freeze(model, until="aux")
    assert same(before, snapshot(model))


def test_freeze_until_a_layer_before_all_parameters_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(SelectionError, match="until='0' selects no parameters"):
        freeze(model, until="0")


def test_freeze_until_in_a_model_whose_forward_fails_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2))
    before = snapshot(model)
    with pytest.raises(ModelError, match="layer '1' \\(Linear\\) was given \\(1, 4\\)"):
        freeze(model, until="0")
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", tiny.ALL)
def test_freeze_leaves_classes_and_keys_and_unfreeze_restores(name: str) -> None:
    model = tiny.build(name).train()
    before = snapshot(model)
    freeze(model)
    frozen = snapshot(model)
    assert frozen["classes"] == before["classes"]
    assert list(frozen["bytes"]) == list(before["bytes"])
    unfreeze(model)
    model.train()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("mode", [True, False])
def test_unfreeze_lets_layers_follow_the_mode_again(mode: bool) -> None:
    model = tiny.build("plain")
    freeze(model)
    unfreeze(model)
    model.train(mode)
    assert all(module.training == mode for module in model.modules())


@pytest.mark.parametrize("name", ["plain", "functional-dropout", "root-token"])
def test_unfreeze_makes_outputs_in_training_mode_random_again(name: str) -> None:
    model, inputs = tiny.build(name), tiny.batch(name)
    freeze(model)
    model.train()
    assert identical(model(inputs), model(inputs))
    unfreeze(model)
    model.train()
    assert not identical(model(inputs), model(inputs))


def test_freeze_leaves_dropout_before_the_head_active_when_only_the_head_is_trained() -> None:
    model, inputs = tiny.build("plain"), tiny.batch("plain")
    freeze(model)
    unfreeze(model, "fc")
    model.train()
    assert model.dropout.training
    assert not model.bn2.training
    assert not identical(model(inputs), model(inputs))


def test_freeze_turns_functional_dropout_off_in_a_frozen_block_and_not_in_a_trainable_one() -> None:
    model, inputs = tiny.build("functional-dropout"), tiny.batch("functional-dropout")
    freeze(model, "block1")
    model.train()
    assert identical(model.block1(inputs), model.block1(inputs))
    assert not identical(model.block2(inputs), model.block2(inputs))


@pytest.mark.parametrize(
    ("call", "patterns"), [(freeze, ("encoder",)), (freeze, ("decoder",)), (unfreeze, ("decoder", "head"))]
)
def test_freeze_reports_a_selection_that_splits_tied_weights(call: Callable[..., object], patterns: tuple[str]) -> None:
    report = call(tiny.build("tied"), *patterns)
    assert report.split_ties == (("encoder.weight", "decoder.weight"),)
    assert "encoder.weight = decoder.weight" in str(report)


@pytest.mark.parametrize("patterns", [("encoder", "decoder"), ("head",), ()])
def test_freeze_reports_nothing_where_tied_weights_are_kept_together(patterns: tuple[str, ...]) -> None:
    assert freeze(tiny.build("tied"), *patterns).split_ties == ()


def test_freeze_clears_stale_gradients_of_what_is_frozen_and_keeps_others() -> None:
    model, inputs = tiny.build("plain"), tiny.batch("plain")
    model(inputs).sum().backward()
    freeze(model, "conv1", "bn1")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(("conv1.", "bn1.")), name


def test_freeze_report_counts_tensors_and_elements() -> None:
    model = tiny.build("plain")
    first, second = freeze(model, "conv1", "bn1"), freeze(model, "conv*", "bn*")
    assert first.changed == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert second.changed == ("conv2.weight", "bn2.weight", "bn2.bias")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert (second.frozen, second.total) == (
        sum(p.numel() for p in frozen),
        sum(p.numel() for p in model.parameters()),
    )
    assert second.pinned == ("bn1", "bn2")
    assert str(first) == (
        "174 of 1,267 parameters frozen (13.7 %), 1,093 trainable; 3 tensors changed, 1 layers stay in evaluation mode"
    )


def test_freeze_twice_is_freeze_once() -> None:
    once, twice = tiny.build("plain"), tiny.build("plain")
    freeze(once, "conv*", "bn*")
    freeze(twice, "conv*", "bn*")
    freeze(twice, "conv*", "bn*")
    assert [len(m._forward_pre_hooks) for m in once.modules()] == [len(m._forward_pre_hooks) for m in twice.modules()]


def test_freeze_of_a_copy_leaves_the_original_trainable() -> None:
    model = tiny.build("plain")
    freeze(copy.deepcopy(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.train().bn1.training


def test_freeze_leaves_auxiliary_outputs_in_training_mode() -> None:
    model = tiny.build("aux-head")
    freeze(model, until="bn")
    model.train()
    assert isinstance(model(tiny.batch("aux-head")), tiny.AuxOutputs)
    assert main_output(model(tiny.batch("aux-head"))).shape == (6, tiny.CLASSES)
    assert select(model, "aux") == ["aux"]
