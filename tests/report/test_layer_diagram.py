"""The drawing of a network: its blocks, their shares and their states."""

import pytest
import torchvision
from torch import nn

import regraft
from regraft.report.layer_diagram import describe_blocks


def test_describe_blocks_follows_execution_and_freezing() -> None:
    model = torchvision.models.resnet18()
    regraft.freeze(model, until="layer3.0")
    model.layer4[0].bn1.requires_grad_(False)
    blocks = describe_blocks(model, regraft.summary(model))
    assert [block.name for block in blocks[:2]] == ["conv1, bn1", "layer1.0"]
    assert blocks[-1].name == "fc"
    states = {block.name: block.state for block in blocks}
    assert [states[name] for name in ("layer3.0", "layer3.1", "layer4.0", "fc")] == [
        "frozen",
        "trainable",
        "partly frozen",
        "head",
    ]
    assert sum(block.parameters for block in blocks) == sum(parameter.numel() for parameter in model.parameters())
    assert sum(block.parameter_share for block in blocks) == pytest.approx(1)
    assert sum(block.cost_share or 0 for block in blocks) == pytest.approx(1, abs=0.01)
    assert blocks[-1].cost_share == pytest.approx(512 * 1000 / 1_814_073_344, rel=0.01)  # as torchvision counts them


def test_describe_blocks_draws_neighbours_of_a_deep_network_as_one() -> None:
    stack = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(50)))
    model = nn.Sequential(stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    regraft.freeze(model, until="0.40")
    blocks = describe_blocks(model, regraft.summary(model))
    names = [block.name for block in blocks]
    assert names[0] == "0.0.0 to 0.2.0"
    assert names[13:16] == [
        "0.39.0 to 0.40.0",
        "0.41.0 to 0.43.0",
        "0.44.0 to 0.46.0",
    ]  # a new row where the state changes
    assert (names[-1], blocks[-1].state) == ("3", "head")
    assert sum(block.parameters for block in blocks) == sum(parameter.numel() for parameter in model.parameters())
