"""What depends on the batch or on the call is found by running it: the frontier lies before it, or it is refused."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork

import regraft
from oracles import identical, same, snapshot
from regraft.errors import EditError, ModelError
from regraft.frontier import Partition, partition

Body = Callable[[Any, torch.Tensor], torch.Tensor]


class Between(nn.Module):
    """A frozen convolution, something, and a trained convolution."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.norm, self.body = nn.BatchNorm2d(8, track_running_stats=False), body
        self.attention = nn.MultiheadAttention(8, 2)
        regraft.freeze(self, "a", "norm", "attention")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.body(self, self.a(x)))


def across(net: Any, h: torch.Tensor) -> torch.Tensor:
    tokens = h.flatten(2).transpose(1, 2)  # (N, T, D), of which this attention takes N for T
    return net.attention(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (6, 6))


MIXING: dict[str, Body] = {
    "difference from the mean": lambda net, h: h - h.mean(0),
    "deviation of all": lambda net, h: h / h.std(),
    "batch norm without statistics": lambda net, h: net.norm(h),
    "flip": lambda net, h: h.flip(0),
    "roll": lambda net, h: h.roll(1, 0),
    "cumulative sum": lambda net, h: h.cumsum(0),
    "sort": lambda net, h: h.sort(0)[0],
    "turned by indices": lambda net, h: h[torch.arange(len(h) - 1, -1, -1)],
    "softmax over images": lambda net, h: h.softmax(0),
    "attention across": across,
}
APART: dict[str, Body] = {
    "group norm": lambda net, h: F.group_norm(h, 2),
    "instance norm": lambda net, h: F.instance_norm(h),
    "images second for a while": lambda net, h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "flattened for a while": lambda net, h: h.reshape(-1).reshape(-1, 8, 6, 6),
    "folded for a while": lambda net, h: h.reshape(-1, 6, 6).tanh().reshape(-1, 8, 6, 6),
    "turned image": lambda net, h: h.flip(2),
}


def require_right(model: nn.Module, parts: Partition, images: Any) -> None:
    model.eval()
    with torch.no_grad():
        kept = parts.prefix(images)
        ours, whole = tree_leaves(parts.suffix.eval()(*kept)), tree_leaves(model(images))
        assert all(identical(a, b) for a, b in zip(ours, whole, strict=True))
        for position in range(len(images)):
            alone = parts.prefix(images[position : position + 1])
            assert all(torch.allclose(a[position], b[0], atol=1e-5) for a, b in zip(kept, alone, strict=True))


@pytest.mark.parametrize("name", MIXING)
def test_partition_ends_before_what_mixes_images(name: str) -> None:
    model, images = Between(MIXING[name]), torch.randn(4, 3, 8, 8)
    before = snapshot(model)
    parts = partition(model, images[:1])
    assert same(before, snapshot(model))
    assert "mixes the images of a batch" in str(parts.note)
    assert parts.multiply_adds[0] > 0
    require_right(model, parts, images)


@pytest.mark.parametrize("name", APART)
def test_partition_keeps_what_only_looks_mixed(name: str) -> None:
    model, images = Between(APART[name]), torch.randn(4, 3, 8, 8)
    parts = partition(model, images[:1])
    assert parts.note is None
    assert [cut.layer for cut in parts.frontier] == [""]  # in the forward, after what is tried
    require_right(model, parts, images)


def test_partition_says_what_mixes_where_nothing_is_left() -> None:
    class AtOnce(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input - input.mean(0))

    model = nn.Sequential(AtOnce(4, 4), nn.Linear(4, 2))
    regraft.freeze(model, "0")
    with pytest.raises(EditError, match=r"nothing of this .* is constant.*'0' mixes the images of a batch"):
        partition(model, torch.zeros(1, 4))


def test_partition_finds_noise_that_nothing_declares() -> None:
    class Noise(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + torch.rand(())

    model = nn.Sequential(nn.Linear(4, 4), Noise(4, 4), nn.Linear(4, 2))
    regraft.freeze(model, "0", "1")
    parts = partition(model, torch.zeros(1, 4))
    assert [cut.layer for cut in parts.frontier] == ["0"]
    assert "'1' draws at random or counts its calls" in str(parts.note)


Pair = namedtuple("Pair", ["low", "high"])
CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[[Any], torch.Tensor]]] = {
    "list": (lambda a, b: [a, b], lambda c: c[0] + c[1]),
    "tuple": (lambda a, b: (a, b), lambda c: c[0] + c[1]),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda c: c["a"] + c["b"]),
    "ordered dict": (lambda a, b: OrderedDict(a=a, b=b), lambda c: sum(c.values())),  # pyright: ignore
    "named tuple": (Pair, lambda c: c.low + c.high),
    "nested, with a number": (lambda a, b: (a, [{"b": b, "n": 3, "none": None}]), lambda c: c[0] + c[1][0]["b"] * 3),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_partition_looks_through_containers(kind: str) -> None:
    pack, unpack = CONTAINERS[kind]

    class Encoder(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> Any:
            return pack(input, super().forward(input))

    class Decoder(nn.Conv2d):
        def forward(self, input: Any) -> torch.Tensor:
            return super().forward(unpack(input))

    model, images = nn.Sequential(Encoder(3, 3, 1), Decoder(3, 2, 1)), torch.randn(4, 3, 8, 8)
    regraft.freeze(model, "0")
    parts = partition(model, images[:1])
    assert [cut.shape for cut in parts.frontier] == [(3, 8, 8)] * 2
    require_right(model, parts, images)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(resnet18(), {"layer1": "low", "layer2": "high"})
        self.pyramid = FeaturePyramidNetwork([64, 128], 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid(self.body(x))


def test_partition_of_a_feature_pyramid() -> None:
    model, images = Pyramid(), torch.randn(3, 3, 32, 48)
    regraft.freeze(model, "body")
    parts = partition(model, images[:1])
    assert [cut.shape for cut in parts.frontier] == [(64, 8, 12), (128, 4, 6)]
    model.eval()
    with torch.no_grad():
        ours, whole = parts.suffix.eval()(*parts.prefix(images)), model(images)
    assert list(ours) == list(whole) == ["low", "high"]
    assert all(identical(ours[name], whole[name]) for name in whole)


def test_partition_of_features_of_timm_and_a_decoder() -> None:
    import timm

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model("test_resnet", features_only=True)
            self.head = nn.Conv2d(self.encoder.feature_info.channels()[-1], 2, 1)  # pyright: ignore

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.encoder(x)
            return self.head(features[-1]) * features[0].mean((1, 2, 3))[:, None, None, None]

    model, images = Net(), torch.randn(3, 3, 32, 64)
    regraft.freeze(model, "encoder")
    require_right(model, partition(model, images[:1]), images)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.out = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.front(x)
        return self.out(x if mask is None else x * mask)


@pytest.mark.parametrize("by_name", [False, True])
def test_partition_takes_optional_inputs(by_name: bool) -> None:
    model, x, mask = Masked(), torch.randn(3, 8), torch.randn(3, 4)
    regraft.freeze(model, "front")
    if by_name:
        parts = partition(model, {"x": x, "mask": mask})
        assert identical(parts.suffix(*parts.prefix(x=x, mask=mask)), model(x, mask))
    else:
        parts = partition(model, (x, mask))
        assert identical(parts.suffix(*parts.prefix(x, mask)), model(x, mask))
    assert identical((alone := partition(model, x)).suffix(*alone.prefix(x)), model(x))


def test_partition_refuses_an_input_without_rows() -> None:
    class Weighted(Masked):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            return self.out(self.front(x)) * mask

    model = Weighted()
    regraft.freeze(model, "front")
    with pytest.raises(ModelError, match="needs the input 'mask', which has no row for each image"):
        partition(model, (torch.randn(3, 8), torch.randn(2)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        h = self.hidden(self.words(ids))
        h = h if mask is None else h * mask[..., None]
        return {"scores": self.head(h.mean(1)), "hidden": h}


def test_partition_of_words() -> None:
    model, ids, mask = Words(), torch.randint(10, (3, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1] * 5])
    regraft.freeze(model, "words", "hidden")
    for given in ((ids,), (ids, mask)):
        parts = partition(model, given)
        ours, whole = parts.suffix(*parts.prefix(*given)), model(*given)
        assert all(identical(ours[name], whole[name]) for name in whole)


def test_partition_takes_a_dict_or_a_list_as_one_input() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, batch: Any) -> torch.Tensor:
            parts = list(batch.values()) if isinstance(batch, dict) else batch
            return self.out(self.front(parts[0]) + self.front(parts[1]))

    model, a, b = Joined(), torch.randn(3, 4), torch.randn(3, 4)
    regraft.freeze(model, "front")
    for batch in ({"left": a, "right": b}, [a, b]):
        parts = partition(model, batch)
        assert identical(parts.suffix(*parts.prefix(batch)), model(batch))


def test_partition_of_images_that_are_not_square() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3), nn.Linear(4 * 5 * 9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count, _, height, width = x.shape
            return self.head(self.b(self.a(x)).view(count, -1)) * (height / width)

    model, images = Sized(), torch.randn(3, 3, 16, 24)
    regraft.freeze(model, "a")
    require_right(model, partition(model, images[:1]), images)


@pytest.mark.parametrize(
    ("model", "images"),
    [
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 14, 2)), torch.randn(3, 2, 16)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 2 * 4 * 6, 2)), torch.randn(3, 1, 4, 6, 8)),
    ],
)
def test_partition_of_other_dimensions(model: nn.Module, images: torch.Tensor) -> None:
    regraft.freeze(model, "0")
    require_right(model, partition(model, images[:1]), images)
