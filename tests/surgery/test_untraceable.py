"""What cannot be traced is cut and extended by hooks, and refuses the other edits."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from oracles import identical, same, snapshot
from regraft.errors import EditError
from surgery.models import first


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if x.sum() > 1e9:
            return x
        return self.head(self.middle(x).relu())


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))


UNTRACEABLE: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "branching": (Branching, torch.ones(2, 4), "middle"),
    "bert": (bert, {"input_ids": torch.ones(2, 7, dtype=torch.int64)}, "encoder.layer.1"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_truncate_and_append_use_hooks_where_a_network_cannot_be_traced(name: str) -> None:
    make, inputs, path = UNTRACEABLE[name]
    model = make().eval()
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    seen: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**given)
    handle.remove()
    expected = first(seen[-1])
    cut = regraft.truncate(model, after=path, inputs=inputs)
    with torch.no_grad():
        assert identical(first(cut(**given)), expected)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    if not isinstance(seen[-1], torch.Tensor):
        return
    grown = regraft.append(cut, nn.Linear(expected.shape[-1], 2), nn.ReLU(), inputs=inputs)
    for again in (grown, copy.deepcopy(grown), pickle.loads(pickle.dumps(grown))):
        with torch.no_grad():
            assert identical(again(**given), F.relu(again.appended_1(expected)))
    shorter = regraft.truncate(grown, drop=1, inputs=inputs)
    with torch.no_grad():
        assert identical(shorter(**given), grown.appended_1(expected))
    grown.train()(**given).sum().backward()


class Halving(nn.Module):
    """Cannot be traced: how often its layer is called depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(x)
        while x.abs().max() > 1:
            x = self.middle(x.tanh()) / 2
        return x


class Sized(nn.Module):
    """Cannot be traced: it makes a Python number of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(x) * float(x.mean())


@pytest.mark.parametrize("make", [Branching, Halving, Sized])
def test_insert_refuses_what_cannot_be_traced_and_says_so(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(EditError, match=r"cannot insert after .* cannot be traced: .*Only replace, replace_head"):
        regraft.insert(model, nn.Identity(), after="middle", inputs=torch.ones(2, 4))
    assert same(before, snapshot(model))


def test_insert_into_bert_with_its_inputs_is_a_hook_that_does_the_same() -> None:
    model = bert().eval()
    scale = nn.Linear(16, 16)
    ids = torch.arange(1, 22).reshape(3, 7)

    def apply(_: nn.Module, __: Any, output: Any) -> Any:
        return (scale(output[0]), *output[1:]) if isinstance(output, tuple) else scale(output)

    edited = regraft.insert(model, scale, after="encoder.layer.1", inputs={"input_ids": ids[:1]})
    with torch.no_grad():
        plain = model(input_ids=ids).last_hidden_state
        handle = model.get_submodule("encoder.layer.1").register_forward_hook(apply)
        expected = model(input_ids=ids).last_hidden_state
        handle.remove()
        assert identical(edited(input_ids=ids).last_hidden_state, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_replace_and_replace_head_take_layers_of_what_cannot_be_traced() -> None:
    model, inputs = Branching(), torch.ones(1, 4)
    middle = nn.Linear(6, 6, bias=False)
    edited = regraft.replace(model, "middle", middle)
    assert identical(edited(inputs), model.head(middle(model.body(inputs)).relu()))
    wider = regraft.replace_head(model, 5)
    assert wider(inputs).shape == (1, 5)
    assert identical(wider(inputs), wider.head(model.middle(model.body(inputs)).relu()))
