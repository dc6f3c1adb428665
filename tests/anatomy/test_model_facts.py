"""Facts of a model: worked out by one run, and those that the functions of their own give."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import regraft
from regraft.anatomy import tracing
from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import ForwardError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classes of the networks that were run on shapes."""
    names: list[str] = []
    run = tracing._on_shapes

    def counted(model: nn.Module, *arguments: Any) -> Any:
        names.append(type(model).__name__)
        return run(model, *arguments)

    monkeypatch.setattr(tracing, "_on_shapes", counted)
    return names


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "googlenet"])
def test_model_facts_take_one_run(name: str, runs: list[str]) -> None:
    extra = {"init_weights": False, "aux_logits": True} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **extra)
    facts = ModelFacts(model)
    head = {"resnet18": "fc", "mobilenet_v3_small": "classifier.3", "vit_b_16": "heads.head", "googlenet": "fc"}[name]
    first = {"resnet18": "conv1", "mobilenet_v3_small": "features.0.0", "vit_b_16": "conv_proj"}
    assert [entry.path for entry in facts.heads] == [entry.path for entry in facts.class_heads] == [head]
    assert facts.head_parameters == {f"{head}.weight", f"{head}.bias"}
    assert facts.first_convolution == first.get(name, "conv1.conv")
    assert facts.auxiliary_heads([head]) == (["aux1.fc2", "aux2.fc2"] if name == "googlenet" else [])
    assert facts.depths[f"{head}.weight"] == max(facts.depths.values())
    assert {call.path for call in facts.trace.calls} >= {head, ""}
    assert runs == [type(model).__name__]


def test_model_facts_keep_the_error_of_a_forward_that_fails(runs: list[str]) -> None:
    facts = ModelFacts(nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 2)), torch.zeros(2, 4))
    for _ in range(3):
        with pytest.raises(ForwardError, match=r"layer '1' \(Linear\) was given \(2, 3\)"):
            _ = facts.trace
    assert len(runs) <= 2  # on the meta device, and on fake tensors where that fails


def test_model_facts_of_a_named_model_do_not_follow_its_flags() -> None:
    model = torchvision.models.resnet18()
    facts = ModelFacts(model)
    before = facts.heads, facts.head_parameters
    regraft.freeze(model)
    again = ModelFacts(model)
    assert (again.heads, again.head_parameters) == before


def test_fit_runs_a_model_on_shapes_once(runs: list[str]) -> None:
    """The check of the head, the rates of two parts and the audit share one run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    regraft.freeze(model, "1")
    images, targets = torch.rand(16, 3, 2, 2), torch.arange(16) % 2
    batches = [(images, targets)]
    regraft.fit(model, (batches, batches), epochs=2, backbone_lr=1e-4)
    assert runs == ["Sequential"]
