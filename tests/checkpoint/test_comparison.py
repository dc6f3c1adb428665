"""`diff` says bit for bit what stayed and what moved."""

from pathlib import Path

import pytest
import torch
from torch import nn

import regraft
import tiny


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    return tiny.build("plain"), tiny.build("plain")


def kinds(found: regraft.Diff) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in found.tensors}


def test_diff_of_a_model_with_itself_and_with_a_copy_is_identical(pair: tuple[nn.Module, nn.Module]) -> None:
    assert regraft.diff(pair[0], pair[0]).identical
    assert regraft.diff(*pair).identical


def test_diff_after_training_is_identical_for_frozen_layers_and_not_for_the_rest(tmp_path: Path) -> None:
    model = tiny.build("plain")
    regraft.freeze(model)
    regraft.unfreeze(model, "fc")
    base = regraft.save(model, tmp_path / "base.safetensors")
    optimizer = regraft.build_optimizer("sgd", model, lr=0.1)
    model.train()(tiny.batch("plain")).sum().backward()
    optimizer.step()
    found = kinds(regraft.diff(base, model))
    assert {name for name, kind in found.items() if kind == "changed"} == {"fc.weight", "fc.bias"}
    assert set(found.values()) == {"changed", "identical"}


def test_diff_relative_norm_is_that_of_the_difference(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    with torch.no_grad():
        b.fc.weight.mul_(1.5)
    changed = next(tensor for tensor in regraft.diff(a, b).tensors if tensor.kind == "changed")
    assert changed.name == "fc.weight"
    assert changed.relative_norm == pytest.approx(0.5)


@pytest.mark.parametrize("value", [-0.0, float("nan")], ids=["negative zero", "NaN"])
def test_diff_counts_one_bit(value: float) -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    for layer in (a, b):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        b.bias.fill_(value)
    found = regraft.diff(a, b).tensors[1]
    assert (found.kind, found.relative_norm) == ("changed", None)


def test_diff_takes_equal_nans_as_identical() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.bias.fill_(float("nan"))
    assert regraft.diff(layer, layer).identical


def test_diff_names_what_is_added_removed_and_reshaped(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    a.old, b.new = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    b.fc = nn.Linear(128, 7)
    found = kinds(regraft.diff(a, b))
    assert (found["old.weight"], found["new.weight"], found["fc.weight"]) == ("removed", "added", "reshaped")
    assert "5×128 → 7×128" in str(regraft.diff(a, b))
