"""A new layer is called, or `replace` says that it would not be."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import regraft
from oracles import identical, same, snapshot
from regraft.errors import EditError


class Plus(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + input.new_ones(self.out_features).cumsum(0)


class Partly(nn.Module):
    """Holds a layer that it calls, one whose weight it reads, one for training alone, and one that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.auxiliary, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = F.linear(self.called(x), self.read.weight)
        return (y, self.auxiliary(x)) if self.training else y


def small_vit() -> nn.Module:
    model = VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=2)
    nn.init.normal_(model.heads[0].weight)
    return model.eval()


def test_replace_refuses_a_layer_that_attention_only_reads() -> None:
    model = small_vit()
    before = snapshot(model)
    with pytest.raises(EditError, match=r"out_proj': that layer is never called\. '.*' \(MultiheadAttention\) reads"):
        regraft.replace(model, "re:.*out_proj", lambda old: Plus(32, 32))
    assert same(before, snapshot(model))


def test_replace_takes_a_layer_that_is_read_alike() -> None:
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    edited = regraft.replace(model, "re:.*out_proj", lambda old: nn.Linear(32, 32), keep_weights=False).eval()
    assert not torch.allclose(edited(images), model(images))
    edited = regraft.replace(model, "re:.*out_proj", lambda old: nn.Linear(32, 32)).eval()
    assert identical(edited(images), model(images))


@pytest.mark.parametrize(
    ("path", "message"),
    [("read", "'read': that layer is never called"), ("unused", "'unused': that layer is never called")],
)
def test_replace_refuses_what_would_be_ignored(path: str, message: str) -> None:
    with pytest.raises(EditError, match=message):
        regraft.replace(Partly(), path, Plus(4, 4), inputs=torch.zeros(1, 4))
    with pytest.raises(EditError, match="'read': that layer is never called"):
        regraft.replace(Partly(), "type:Linear", lambda old: Plus(4, 4), inputs=torch.zeros(1, 4))


@pytest.mark.parametrize("path", ["called", "auxiliary", "re:called|unused"])
def test_replace_takes_what_is_called_in_either_mode(path: str) -> None:
    edited = regraft.replace(Partly(), path, lambda old: Plus(4, 4), inputs=torch.zeros(1, 4))
    assert any(isinstance(layer, Plus) for layer in edited.modules())


@pytest.mark.parametrize("where", ["after", "before"])
def test_insert_refuses_beside_a_layer_that_is_never_called(where: str) -> None:
    path = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    with pytest.raises(EditError, match=rf"{where} '{path}': that layer is never called"):
        regraft.insert(small_vit(), nn.ReLU(), **{where: path})
    with pytest.raises(EditError, match="'unused': that layer is never called"):
        regraft.insert(Partly(), nn.ReLU(), inputs=torch.zeros(1, 4), **{where: "unused"})


NEW: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "linear": ("layers.0.linear1", lambda old: Plus(16, 32)),
    "around": ("layers.1.linear2", lambda old: nn.Sequential(old, nn.Tanh())),
    "norm": ("layers.1.norm1", lambda old: nn.RMSNorm(16)),
}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("has_mask", [False, True])
def test_replace_in_a_transformer_layer_is_not_bypassed(name: str, has_mask: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 6, 16)
    options = {"src_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])} if has_mask else {}
    path, new = NEW[name]
    edited = regraft.replace(model, path, new, inputs=x).eval()
    calls: list[torch.Tensor] = []
    probe = edited.get_submodule(path)
    forward = probe.forward
    probe.forward = lambda input: calls.append(input) or forward(input)
    with torch.no_grad():  # where the fused kernel would run
        fused = edited(x, **options)
    assert calls
    assert torch.allclose(fused, edited(x, **options), atol=1e-5)


def test_replace_says_what_a_transformer_layer_reads_of_attention() -> None:
    class Mean(nn.Module):
        def forward(self, query: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
            return query.mean(1, keepdim=True).expand_as(query), None

    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model["layer"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(EditError, match="reads 'batch_first' of it, which a Mean does not have"):
        regraft.replace(Net(), "layer.self_attn", Mean(), inputs=torch.zeros(1, 6, 16))
