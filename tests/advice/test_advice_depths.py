"""Where the frozen part of a network may end."""

import pytest
import torch
from torch import nn
from torchvision import models

import regraft
import tiny
from regraft.advice.depths import list_boundaries
from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import SelectionError


def test_list_boundaries_names_what_freeze_takes() -> None:
    model = models.resnet18()
    boundaries = list_boundaries(ModelFacts(model))
    assert [boundary.layer for boundary in boundaries] == ["layer1.0", "layer2.0", "layer2", "layer3", "avgpool"]
    for boundary in boundaries:
        regraft.unfreeze(model)
        regraft.freeze(model, until=boundary.layer)
        assert boundary.trained == {name for name, p in model.named_parameters() if p.requires_grad}


def test_list_boundaries_follows_the_order_of_execution() -> None:
    layers = [boundary.layer for boundary in list_boundaries(ModelFacts(tiny.Residual()))]
    assert layers.index("stem_norm") == 0
    assert "head" not in layers


def test_list_boundaries_takes_layers_that_are_named() -> None:
    facts = ModelFacts(models.resnet18())
    assert [b.layer for b in list_boundaries(facts, ["layer3", "layer1"])] == ["layer1", "layer3", "avgpool"]
    with pytest.raises(SelectionError, match=r"layer 'fc' of ResNet cannot be the last frozen one: no parameter is"):
        list_boundaries(facts, ["fc"])
    with pytest.raises(SelectionError, match="layer9"):
        list_boundaries(facts, ["layer9"])


def test_list_boundaries_gives_none_without_a_block_before_the_head() -> None:
    assert list_boundaries(ModelFacts(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))) == []

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    assert list_boundaries(ModelFacts(Broken())) == []
