"""Frozen means bit-identical beyond image classifiers: shared weights, several inputs, dicts, control flow, recurrence.

Each network is frozen up to a layer, trained for three steps in training mode, and compared tensor by tensor, buffers
that are not in the state dict included. What is expected to be frozen is written down by hand.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import tiny
from oracles import identical
from regraft import audit, build_optimizer, freeze

WIDTH = 8
ROUNDING = 1e-5  # a gradient below it may be lost in a parameter near 1


class TwoInputs(nn.Module):
    """Two branches, registered in the reverse of the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * WIDTH, 3)
        self.right = nn.Sequential(nn.Linear(5, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        self.left = nn.Sequential(nn.Linear(4, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.left(left), self.right(right)], 1))


class DictOutput(nn.Module):
    """Two tasks on one trunk, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU())
        self.label = nn.Linear(WIDTH, 3)
        self.box = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.trunk(x)
        return {"label": self.label(x), "boxes": [self.box(x)]}


class ControlFlow(nn.Module):
    """Looks at its input's values to choose a branch, and runs one block as often as it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))
        self.loop = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH))
        self.never = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(2 + int(x.isnan().any())):
            x = F.relu(self.loop(x))
        return self.head(self.never(x) if x.sum() < 0 else x)


class Recurrent(nn.Module):
    """Words, a stack of LSTM layers with dropout between them, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.first = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
        self.second = nn.GRU(2 * WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.first(self.dropout(self.words(tokens)))
        x, _ = self.second(x)
        return self.head(x[:, -1])


class Wandering(nn.Module):
    """A block with a running average of its own, kept out of the state dict, that it moves while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average += 0.1 * (x.detach().mean(0) - self.average)
        return self.linear(x - self.average)


def vector() -> tuple[torch.Tensor]:
    return (torch.randn(6, 4),)


# A network, its inputs, the layer to freeze until, and the layers that are to be frozen then.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], str, tuple[str, ...]]] = {
    "shared weights": (
        lambda: tiny.build("tied"),
        lambda: (tiny.batch("tied"),),
        "norm",
        ("encoder", "norm", "decoder.weight"),
    ),
    "two inputs": (TwoInputs, lambda: (torch.randn(6, 4), torch.randn(6, 5)), "left", ("left",)),
    "two inputs, both branches": (
        TwoInputs,
        lambda: (torch.randn(6, 4), torch.randn(6, 5)),
        "right.1",
        ("left", "right"),
    ),
    "dict output": (DictOutput, vector, "trunk", ("trunk",)),
    "dict output, one head": (DictOutput, vector, "label", ("trunk", "label")),
    "control flow": (ControlFlow, lambda: (torch.rand(6, 4),), "stem", ("stem",)),
    "control flow, block in a loop": (ControlFlow, lambda: (torch.rand(6, 4),), "loop", ("stem", "loop")),
    "recurrent": (Recurrent, lambda: (torch.randint(20, (6, 5)),), "first", ("words", "first")),
    "recurrent, both": (Recurrent, lambda: (torch.randint(20, (6, 5)),), "second", ("words", "first", "second")),
    "statistics of its own": (lambda: nn.Sequential(Wandering(), Wandering(), nn.Linear(4, 3)), vector, "0", ("0",)),
}


def below(name: str, layers: tuple[str, ...]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters by each of their names, and all buffers, also those that no state dict has."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def train(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
    """Take three steps with momentum and decay, so that whatever may move does."""
    optimizer = build_optimizer("sgd", model, lr=0.05, weight_decay=0.5, momentum=0.9)
    assert audit(model, optimizer) == []
    for _ in range(3):
        outputs = [x for x in tree_leaves(model.train()(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        optimizer.zero_grad()
        torch.stack([x.square().mean() for x in outputs if x.requires_grad]).sum().backward()
        optimizer.step()


def moved_by_training(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> set[str]:
    before = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    train(model, *args, **kwargs)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > ROUNDING:
            assert not identical(before[name], parameter), f"{name} is trainable and did not move"
    return {name for name, tensor in tensors(model).items() if not identical(before[name], tensor)}


@pytest.mark.parametrize("name", CASES)
def test_freeze_keeps_what_is_frozen_bit_identical_after_training_and_the_rest_moves(name: str) -> None:
    make, draw, until, expected = CASES[name]
    model, inputs = make(), draw()
    freeze(model, until=until, inputs=inputs)
    frozen = {key for key in tensors(model) if below(key, expected)}
    flags = model.named_parameters(remove_duplicate=False)
    assert {key for key, parameter in flags if not parameter.requires_grad} == frozen & dict(
        model.named_parameters(remove_duplicate=False)
    ).keys()
    moved = moved_by_training(model, *inputs)
    assert moved
    assert not moved & frozen


@pytest.mark.parametrize("name", CASES)
def test_freeze_oracle_the_same_training_moves_those_tensors_where_nothing_is_frozen(name: str) -> None:
    make, draw, _, expected = CASES[name]
    model = make()
    moved = moved_by_training(model, *draw())
    assert {key for key in tensors(model) if below(key, expected)} <= moved


@pytest.mark.parametrize("name", [name for name in CASES if "control" not in name])
def test_freeze_lets_the_front_give_the_same_in_training_mode_each_time(name: str) -> None:
    make, draw, until, _ = CASES[name]
    model, inputs, seen = make(), draw(), []
    freeze(model, until=until, inputs=inputs)
    layer = model.get_submodule(until)
    layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(tree_leaves(output)[0].detach().clone()))
    for _ in range(2):
        model.train()(*inputs)
    assert identical(*seen)


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"pixel_values": (2, 3, 16, 16)}
# The class, its configuration's class and options, the floating-point inputs by shape, the layer, what it opens with.
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]], str, str]] = {
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        HIDDEN | {"image_size": 16, "patch_size": 8},
        IMAGE,
        "layers.1",
        "embeddings",
    ),
    "BERT": (
        "BertForSequenceClassification",
        "BertConfig",
        HIDDEN | {"vocab_size": 50, "max_position_embeddings": 32},
        {},
        "layer.1",
        "embeddings",
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "vocab_size": 50},
        {},
        "h.1",
        "wte",
    ),
    "Whisper encoder": (
        "WhisperEncoder",
        "WhisperConfig",
        {
            "d_model": 16,
            "encoder_layers": 4,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "dropout": 0.1,
        },
        {"input_features": (2, 8, 40)},
        "layers.1",
        "conv1",
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        {"pixel_values": (2, 3, 32, 32)},
        "stages.0",
        "embedder",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers' own modules
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_freeze_until_a_layer_of_networks_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, config_kind, options, shapes, end, opening = HUGGING_FACE[name]
    home = transformers if hasattr(transformers, kind) else transformers.models.whisper.modeling_whisper
    model: nn.Module = getattr(home, kind)(getattr(transformers, config_kind)(**options))
    inputs = {key: torch.randn(shape) for key, shape in shapes.items()} or {"input_ids": torch.randint(50, (2, 6))}
    ends = (end, end.replace("layers.", "layer."))  # as releases of transformers call them
    until = next(
        path for path, _ in model.named_modules() if path in ends or path.endswith(tuple(f".{e}" for e in ends))
    )
    following = f"{until[:-1]}{int(until[-1]) + 1}"
    freeze(model, until=until, inputs=inputs)

    parameters = dict(model.named_parameters())
    frozen = {key for key, parameter in parameters.items() if not parameter.requires_grad}
    assert {key for key in parameters if below(key, (until,))} <= frozen
    assert any(opening in key.split(".") for key in frozen)
    assert not {key for key in frozen if below(key, (following,))}
    still = {
        key for key in tensors(model) if below(key, (until,)) or opening in key.split(".") or key in frozen
    }  # with the running statistics in these layers
    moved = moved_by_training(model, **inputs)
    assert {key for key in moved if below(key, (following,))}
    assert not moved & still
