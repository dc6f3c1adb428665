"""The faster copy of a constant part gives the same, and writes over nothing that is read elsewhere."""

import pytest
import torch
from torch import nn
from torchvision import models

import regraft
from oracles import identical
from regraft.frontier import partition
from regraft.frontier.fuse import faster


class Branched(nn.Module):
    """Its first activation is given what the sum needs as well, the second what nothing else needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.inner, self.inner_act = nn.Conv2d(4, 4, 1), nn.SiLU()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.inner_act(self.inner(self.act(x)))
        return self.fc((x + y).mean((2, 3)))


class Reused(Branched):
    """Its second activation is called twice, once on what is read elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.inner_act(self.inner(x))
        return self.fc((x + self.inner_act(x) * y).mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "swin_t"])
def test_faster_gives_the_same_and_leaves_the_original(name: str) -> None:
    model = models.get_model(name, weights=None)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    regraft.freeze(model)
    regraft.unfreeze(model, *regraft.anatomy.heads.find_heads(model))
    inputs = torch.randn(2, 3, 64, 64)
    prefix = partition(model, inputs).prefix
    before = {key: (tensor.clone(), tensor.stride()) for key, tensor in prefix.state_dict().items()}
    quick = faster(prefix)
    with torch.inference_mode():
        for ours, theirs in zip(quick(inputs), prefix(inputs), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    now = prefix.state_dict()
    assert all(identical(now[key], tensor) and now[key].stride() == stride for key, (tensor, stride) in before.items())
    if name == "resnet18":
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in quick.modules())


@pytest.mark.parametrize(
    ("make", "writes"), [(Branched, {"act": False, "inner_act": True}), (Reused, {"inner_act": False})]
)
def test_faster_lets_an_activation_write_over_what_nothing_else_reads(
    make: type[Branched], writes: dict[str, bool]
) -> None:
    model = make()
    regraft.freeze(model, "conv", "act", "inner", "inner_act")
    inputs = torch.randn(2, 3, 8, 8)
    prefix = partition(model, inputs).prefix
    quick = faster(prefix)
    assert {path: quick.get_submodule(path).inplace for path in writes} == writes
    assert not model.inner_act.inplace
    with torch.inference_mode():
        (ours,), (theirs,) = quick(inputs), prefix(inputs)
    assert torch.allclose(ours, theirs, atol=1e-6)
