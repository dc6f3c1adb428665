"""Models that cannot run on shapes alone are run once, and are afterwards what they were before."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from anatomy.networks import (
    DataDependent,
    FailsLate,
    ReplacesItsWeights,
    ThroughItem,
    ThroughNumpy,
    WritesItsWeights,
)
from oracles import same, snapshot
from regraft import freeze, summary
from regraft.anatomy.tracing import trace
from regraft.errors import ModelError

KINDS = (DataDependent, ThroughNumpy, ThroughItem, ReplacesItsWeights)


@pytest.mark.parametrize("kind", KINDS)
def test_summary_takes_shapes_from_one_real_forward_and_says_so(kind: type[DataDependent]) -> None:
    found = summary(kind(), (3, 4))
    shapes = {layer.path: layer.output_shape for layer in found.layers}
    assert (shapes[""], shapes["first"], shapes["last"]) == ((3, 2), (3, 4), (3, 2))
    assert found.layers[0].multiply_adds == 3 * (4 * 4 + 4 * 2)
    assert found.problem is None
    assert found.note is not None
    assert found.note in str(found)
    assert "one real forward on random numbers" in found.note


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, FailsLate, WritesItsWeights])
def test_summary_changes_nothing_by_a_real_run(
    kind: type[DataDependent], training: bool, random_state: Callable[[], tuple[object, ...]]
) -> None:
    model = kind().train(training)
    freeze(model, "first")
    model.dropout.training = not training
    model.last.register_forward_hook(lambda *_: pytest.fail("a hook of the model was called"))
    given = torch.randn(3, 4)
    before, state, copy = snapshot(model), random_state(), given.clone()
    for arguments in ({}, {"input_size": (3, 4)}, {"inputs": given}):
        if kind in (FailsLate, WritesItsWeights) and arguments:
            with pytest.raises(ModelError):
                summary(model, **arguments)
        else:
            summary(model, **arguments)
    assert same(before, snapshot(model))
    assert random_state() == state
    assert torch.equal(given, copy)
    assert model.log == []


def test_summary_names_the_layer_where_a_real_run_fails() -> None:
    with pytest.raises(ModelError, match=r"layer 'first' \(Linear\) was given \(1, 5\)"):
        summary(DataDependent(), (1, 5))
    with pytest.raises(ModelError, match="it was all in vain"):
        summary(FailsLate(), (1, 4))
    with pytest.raises(ModelError, match="writes to its own parameters"):
        summary(WritesItsWeights(), (1, 4))


def test_summary_follows_the_way_that_given_values_decide() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(2, 3), nn.Linear(2, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.high(x) if x.sum() > 0 else self.low(x)

    model = Forks()
    assert summary(model, inputs=torch.ones(1, 2)).layers[0].output_shape == (1, 5)
    low = summary(model, inputs=-torch.ones(1, 2))
    assert low.layers[0].output_shape == (1, 3)
    assert low.note is not None
    assert "on the given inputs" in low.note
    assert trace(model, inputs=-torch.ones(1, 2)).first_uses.keys() == {"low.weight", "low.bias"}


def test_summary_on_the_meta_device_has_no_values_to_run_on() -> None:
    with torch.device("meta"):
        model = DataDependent()
    found = summary(model)
    assert found.problem is not None
    assert found.layers[0].parameters == sum(parameter.numel() for parameter in model.parameters())


def test_summary_does_not_print_a_failed_run_on_shapes(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError):
        summary(nn.Sequential(nn.Linear(3, 2)), (1, 5))
    assert capfd.readouterr() == ("", "")


def test_freeze_half_of_a_model_that_needs_values() -> None:
    model = DataDependent()
    freeze(model, until="norm", inputs=torch.ones(2, 4))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"first.weight", "first.bias", "norm.weight", "norm.bias"}
