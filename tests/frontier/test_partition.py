"""The two parts of a network give what the whole gives, bit for bit, and the first part is really constant."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import regraft
import tiny
from frontier.architectures import NETS, PATTERNS, make
from oracles import identical, same, snapshot
from regraft.errors import EditError, ModelError
from regraft.frontier import partition


def run(model: Callable[..., Any], *inputs: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(4)
    output = model(*inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("resnet18", "swin_t") else pytest.mark.slow) for n in NETS]
)
def test_partition_gives_two_parts_that_are_the_whole_in_either_mode(name: str, pattern: str) -> None:
    model = make(name)
    PATTERNS[pattern](model)
    inputs = torch.randn(3, 3, NETS[name], NETS[name])
    before = snapshot(model)
    parts = partition(model, inputs[:1])
    assert same(before, snapshot(model))
    with torch.no_grad():
        assert identical(run(parts.suffix.eval(), *parts.prefix(inputs)), run(model.eval(), inputs))
    reference = copy.deepcopy(model).train()
    assert identical(run(parts.suffix.train(), *parts.prefix(inputs)), run(reference, inputs))
    prove_constant(model, parts.prefix, inputs)
    mine = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for p in (*parts.prefix.parameters(), *parts.suffix.parameters())} <= mine
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable <= {id(p) for p in parts.suffix.parameters()}


def prove_constant(model: nn.Module, prefix: nn.Module, inputs: torch.Tensor) -> None:
    """Move everything that is trainable, train with batch statistics, and see that the prefix gives the same."""
    with torch.no_grad():
        before = [tensor.clone() for tensor in prefix(inputs)]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.randn_like(inputs))
        assert all(identical(a, b) for a, b in zip(before, prefix(inputs), strict=True))


def test_partition_of_a_resnet_ends_at_the_last_frozen_block() -> None:
    model = models.resnet18()
    regraft.freeze(model, until="layer3.0")
    parts = partition(model, torch.zeros(1, 3, 224, 224))
    assert [(cut.layer, cut.shape) for cut in parts.frontier] == [("layer3.0", (256, 14, 14))]
    assert parts.bytes == 256 * 14 * 14 * 4
    assert sum(parts.multiply_adds) == pytest.approx(1_814_073_344)


def test_partition_takes_dropout_that_nothing_pins_as_live() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)  # by hand: nothing is pinned
    assert [cut.layer for cut in partition(model, torch.zeros(1, 4)).frontier] == ["0"]
    regraft.freeze(model, "0", "1", "2")
    assert [cut.layer for cut in partition(model, torch.zeros(1, 4)).frontier] == ["3"]


def test_partition_takes_batch_norm_that_nothing_pins_as_live() -> None:
    model = models.resnet18()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.fc.requires_grad_(True)
    assert [cut.layer for cut in partition(model, torch.zeros(1, 3, 64, 64)).frontier] == ["conv1"]
    regraft.freeze(model)
    regraft.unfreeze(model, "fc")
    assert [cut.shape for cut in partition(model, torch.zeros(1, 3, 64, 64)).frontier] == [(512,)]


def test_partition_takes_functional_dropout_as_its_block() -> None:
    model = tiny.build("functional-dropout")
    regraft.freeze(model, "block1")
    assert [cut.layer for cut in partition(model, torch.zeros(1, 12)).frontier] == ["block1"]
    model = tiny.build("functional-dropout")
    model.get_submodule("block1").requires_grad_(False)
    assert [cut.layer for cut in partition(model, torch.zeros(1, 12)).frontier] == ["block1"]
    parts = partition(model, torch.zeros(1, 12))
    assert parts.frontier[0].shape == (12,)
    assert not identical(
        parts.suffix.train()(*parts.prefix(torch.ones(1, 12))), parts.suffix(*parts.prefix(torch.ones(1, 12)))
    )


def test_partition_takes_a_smaller_tensor_before_the_frontier() -> None:
    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 4096), nn.ReLU(), nn.Linear(4096, 2))
    regraft.freeze(model, "0", "1")
    parts = partition(model, torch.zeros(1, 8))
    assert [cut.layer for cut in parts.frontier] == ["0"]
    assert "cut earlier, after '0'" in str(parts.note)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [(regraft.freeze, "nothing of this .* is live"), (regraft.unfreeze, "nothing of this .* is constant")],
)
def test_partition_needs_two_parts(prepare: Callable[[nn.Module], object], message: str) -> None:
    model = tiny.build("plain")
    prepare(model)
    with pytest.raises(EditError, match=message):
        partition(model, tiny.batch("plain"))


def test_partition_says_that_a_forward_looks_at_values() -> None:
    class Branching(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if input.sum() > 0 else input

    model = Branching(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ModelError, match=r"cannot be traced: its own forward.*Nor can it be recorded and replayed"):
        partition(model, torch.zeros(1, 4))


def test_partition_does_not_keep_images_apart_that_are_mixed() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).mean(0, keepdim=True))

    model = Mixing()
    model.first.requires_grad_(False)
    found = partition(model, torch.zeros(1, 4))
    assert [cut.layer for cut in found.frontier] == ["first"]
