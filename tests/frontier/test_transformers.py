"""Networks of transformers, which take what they take by name and are opened by nobody: split at any depth."""

from typing import Any

import pytest
import torch
from torch import nn

import regraft
from oracles import identical, same, snapshot
from regraft.frontier import partition

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def vit() -> tuple[nn.Module, dict[str, torch.Tensor], list[str]]:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    blocks = "vit.layers" if hasattr(model.vit, "layers") else "vit.encoder.layer"  # as transformers 5.0 names them
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, ["vit.embeddings", f"{blocks}.0"]


def bert(with_mask: bool) -> tuple[nn.Module, dict[str, torch.Tensor], list[str]]:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, vocab_size=50))
    inputs = {"input_ids": torch.randint(1, 50, (2, 7))} | ({"attention_mask": MASK} if with_mask else {})
    return model, inputs, ["bert.embeddings", "bert.encoder.layer.0"]


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "bert with a mask"])
def test_partition_of_half_a_transformer(name: str, wrapped: bool) -> None:
    model, inputs, frozen = vit() if name == "vit" else bert(name != "bert")
    if wrapped:
        model, frozen = Wrapped(model), [f"network.{path}" for path in frozen]
    regraft.freeze(model, *frozen)
    before = snapshot(model)
    parts = partition(model, inputs)
    assert same(before, snapshot(model))
    assert 0.2 < parts.multiply_adds[0] / sum(parts.multiply_adds) < 0.6
    model.eval()
    with torch.no_grad():
        assert identical(parts.suffix.eval()(*parts.prefix(**inputs)).logits, model(**inputs).logits)


def test_partition_of_a_frozen_transformer_with_a_head() -> None:
    model, inputs, _ = vit()
    regraft.freeze(model, "vit")
    parts = partition(model, inputs)
    assert [cut.shape for cut in parts.frontier] == [(16,)]
    other = {"pixel_values": torch.randn(5, 3, 16, 16)}
    model.eval()
    with torch.no_grad():
        assert identical(parts.suffix.eval()(*parts.prefix(**other)).logits, model(**other).logits)
