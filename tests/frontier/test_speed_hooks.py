"""The faster copy of layers that are more than their kernel: hooks, parametrizations, norms of other kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import regraft
from regraft.frontier import partition
from regraft.frontier.fuse import faster
from training.factories import write_photos


class Net(nn.Module):
    preprocessing = {"size": 16, "resize": 16}  # noqa: RUF012

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm if norm is not None else nn.BatchNorm2d(8), nn.ReLU()
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.norm(self.conv(x))).mean((2, 3)))


class Reads(Net):
    """Reads the tensors of layers that it calls as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x))) + self.conv.weight.mean() + self.norm.weight.sum()
        return self.out(y.mean((2, 3)))


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + weight.flip(-1)


class Own(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, 2)


def hooked(layer: nn.Module, hook: str, function: Callable[..., Any]) -> nn.Module:
    getattr(layer, hook)(function)
    return layer


def registered(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def own_forward(layer: nn.Module) -> nn.Module:
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "make",
    {
        "weight norm": lambda: Net(nn.utils.weight_norm(conv())),
        "parametrized weight norm": lambda: Net(parametrizations.weight_norm(conv())),
        "spectral norm": lambda: Net(nn.utils.spectral_norm(conv())),
        "parametrized spectral norm": lambda: Net(parametrizations.spectral_norm(conv())),
        "orthogonal": lambda: Net(parametrizations.orthogonal(conv())),
        "pruned": lambda: Net(prune.l1_unstructured(conv(), "weight", 0.5)),
        "pruned bias": lambda: Net(prune.l1_unstructured(conv(), "bias", 0.5)),
        "pruned norm": lambda: Net(conv(), prune.l1_unstructured(nn.BatchNorm2d(8), "weight", 0.5)),
        "parametrized": lambda: Net(registered(conv())),
        "hook on the convolution": lambda: Net(hooked(conv(), "register_forward_hook", lambda _, x, y: y * 2 + 1)),
        "pre-hook on the convolution": lambda: Net(
            hooked(conv(), "register_forward_pre_hook", lambda _, x: (x[0] * 2,))
        ),
        "hook on the norm": lambda: Net(
            conv(), hooked(nn.BatchNorm2d(8), "register_forward_hook", lambda _, x, y: y + x[0])
        ),
        "class of one's own": lambda: Net(Own(3, 8, 3, 2)),
        "norm of one's own": lambda: Net(conv(), OwnNorm(8)),
        "forward of one's own": lambda: Net(own_forward(conv())),
        "no affine parameters": lambda: Net(conv(), nn.BatchNorm2d(8, affine=False)),
        "no bias": lambda: Net(nn.Conv2d(3, 8, 3, 2, bias=False)),
        "group norm": lambda: Net(conv(), nn.GroupNorm(2, 8)),
        "instance norm": lambda: Net(conv(), nn.InstanceNorm2d(8, track_running_stats=True)),
        "tensors that others read": lambda: Reads(conv()),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_faster_gives_the_same_whatever_a_layer_carries(
    make: tuple[str, Callable[[], nn.Module]], tmp_path: Path
) -> None:
    model = make[1]()
    model(torch.randn(4, 3, 16, 16))
    model.eval()
    regraft.freeze(model)
    regraft.unfreeze(model, "out")
    inputs = torch.randn(4, 3, 16, 16)
    features = []
    handle = model.out.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    model(inputs)
    handle.remove()
    quick = faster(partition(model, inputs).prefix)
    with torch.inference_mode():
        (found,) = quick(inputs)
    assert torch.allclose(found.flatten(), features[0].flatten(), rtol=1e-3, atol=1e-4)
    write_photos(tmp_path, 6)
    result = regraft.fit(model, tmp_path, epochs=1, lr=1e-2)
    assert result.computed_once is not None


def test_faster_leaves_what_a_hook_has_kept() -> None:
    kept: list[torch.Tensor] = []
    model = Net(hooked(conv(), "register_forward_hook", lambda _, x, y: kept.append(y)), nn.Identity())
    regraft.freeze(model)
    regraft.unfreeze(model, "out")
    inputs = torch.randn(2, 3, 16, 16)
    quick = faster(partition(model, inputs).prefix)
    kept.clear()
    with torch.inference_mode():
        quick(inputs)
    assert (kept[0] < 0).any()


def test_fit_trains_before_a_norm_that_follows_its_batch(tmp_path: Path) -> None:
    model = Net(conv(), nn.BatchNorm2d(8, track_running_stats=False))
    regraft.freeze(model)
    regraft.unfreeze(model, "out")
    write_photos(tmp_path, 6)
    assert len(regraft.fit(model, tmp_path, epochs=1, lr=1e-2).history) == 1
