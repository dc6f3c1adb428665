"""What a forward draws, counts or is given: traced networks do as the original does, or tracing is refused."""

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regraft
from oracles import identical
from regraft.anatomy.dataflow.graph import capture, capture_widely
from regraft.anatomy.inputs import Arguments
from regraft.errors import EditError, ForwardError, ModelError

GENERATOR = np.random.default_rng(0)
IMAGES = torch.randn(2, 3, 8, 8)
Body = Callable[[Any, torch.Tensor], torch.Tensor]


class Noisy(nn.Module):
    """A network whose forward is given as a function."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.body, self.calls, self.generator = body, 0, random.Random(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def counted(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return net.b(net.a(x)) * net.calls


def warmed_up(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return net.b(net.a(x)) if net.calls > 1000 else net.b(net.a(x) * 0)


DRAWN: dict[str, Body] = {
    "randn": lambda net, x: net.b(net.a(x) + torch.randn(1, 8, 1, 1)),
    "rand of a traced size": lambda net, x: net.b(net.a(x) + torch.rand(x.shape[0], 8, 1, 1)),
    "randperm": lambda net, x: net.b(net.a(x)[:, torch.randperm(8)]),
    "bernoulli": lambda net, x: net.b(net.a(x) * torch.bernoulli(torch.full((1, 8, 1, 1), 0.5))),
    "dropout of ones": lambda net, x: net.b(net.a(x) * F.dropout(torch.ones(1, 8, 1, 1), 0.5)),
    "distribution": lambda net, x: net.b(net.a(x) + torch.distributions.Normal(0, 1).sample((1, 8, 1, 1))),
}
REFUSED: dict[str, tuple[Body, str]] = {
    "branch": (
        lambda net, x: net.b(net.a(x) if not net.training or torch.rand(1) < 0.5 else net.a(x) * 0),
        "inputs to control flow",
    ),
    "random": (lambda net, x: net.b(net.a(x) * random.random()), "draws random numbers"),
    "numpy": (lambda net, x: net.b(net.a(x) * float(np.random.rand())), "draws random numbers"),
    "a generator of its own": (lambda net, x: net.b(net.a(x) * net.generator.random()), "draws random numbers"),
    "a generator beside it": (lambda net, x: net.b(net.a(x) * float(GENERATOR.random())), "does not do the same|draws"),
    "into a tensor": (lambda net, x: net.b(net.a(x) * torch.empty(1, 8, 1, 1).bernoulli_(0.5)), "bernoulli_"),
    "time": (lambda net, x: net.b(net.a(x) * time.perf_counter()), "does not do the same in every call"),
    "counter": (counted, "counts its calls"),
    "counter that decides": (warmed_up, "counts its calls"),
}


def outputs(model: nn.Module) -> int:
    """Count the different outputs of eight training-mode calls."""
    model.train()
    with torch.no_grad():
        return len({model(IMAGES).sum().item() for _ in range(8)})


@pytest.mark.parametrize("name", DRAWN)
def test_insert_keeps_what_is_drawn_random(name: str) -> None:
    model = Noisy(DRAWN[name])
    edited = regraft.insert(model, nn.Identity(), after="a", inputs=IMAGES)
    assert outputs(model) > 1
    assert outputs(edited) > 1
    torch.manual_seed(3)
    expected = model(IMAGES)
    torch.manual_seed(3)
    assert identical(edited(IMAGES), expected)


@pytest.mark.parametrize("name", DRAWN)
def test_partition_calls_live_what_is_drawn(name: str) -> None:
    model = Noisy(DRAWN[name])
    regraft.freeze(model, "a")
    parts = regraft.partition(model, IMAGES)
    assert "a" in [cut.layer for cut in parts.frontier]
    with torch.no_grad():
        kept = parts.prefix(IMAGES)
        assert all(identical(one, other) for one, other in zip(kept, parts.prefix(IMAGES), strict=True))
        assert len({parts.suffix(*kept).sum().item() for _ in range(8)}) > 1


@pytest.mark.parametrize("name", REFUSED)
def test_insert_refuses_what_it_would_repeat(name: str) -> None:
    body, message = REFUSED[name]
    model = Noisy(body)
    with pytest.raises(EditError, match=message):
        regraft.insert(model, nn.Identity(), after="a", inputs=IMAGES)
    assert model.calls == 0


@pytest.mark.parametrize("name", ["random", "numpy", "counter"])
def test_append_goes_on_without_a_graph(name: str) -> None:
    assert outputs(regraft.append(Noisy(REFUSED[name][0]), nn.Identity(), inputs=IMAGES)) > 1


@pytest.mark.parametrize("name", ["random", "numpy", "a generator of its own", "into a tensor", "counter"])
def test_partition_refuses_what_changes_from_call_to_call(name: str) -> None:
    model = Noisy(REFUSED[name][0])
    regraft.freeze(model, "a")
    with pytest.raises(ModelError, match=r"cannot be traced.*Nor can it be recorded and replayed: its forward"):
        regraft.partition(model, IMAGES)


@pytest.mark.parametrize("name", ["random", "numpy", "a generator of its own", "into a tensor"])
def test_capture_widely_leaves_a_layer_closed_that_draws(name: str, random_state: Callable[[], object]) -> None:
    model = nn.Sequential(Noisy(REFUSED[name][0]), Noisy(DRAWN["randn"]))
    model[1].a = nn.Conv2d(4, 8, 3)
    before = random_state()
    _, opened = capture_widely(model, ["0", "1"])
    assert opened == ("1",)
    assert random_state() == before


def test_capture_allows_what_a_forward_sets_to_the_same_each_time() -> None:
    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        net.calls = 7
        return net.b(net.a(x))

    model = Noisy(body)
    assert identical(torch.fx.GraphModule(model, capture(model).graph)(IMAGES), model(IMAGES))


def test_capture_gives_torch_back_as_it_was() -> None:
    before = {name: getattr(torch, name) for name in ("rand", "zeros", "arange")}
    with pytest.raises(ForwardError):
        capture(Noisy(lambda net, x: net.b(net.a(x)) if x.sum() > 0 else x))
    assert all(getattr(torch, name) is function for name, function in before.items())


class AnyInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.net(*args, **kwargs)


class Optional(AnyInputs):
    def forward(self, x: torch.Tensor | None = None, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.net(x)
        return y if scale is None else y * scale


@pytest.mark.parametrize("kind", [AnyInputs, Optional])
@pytest.mark.parametrize("inputs", [None, torch.zeros(3, 4)])
def test_truncate_insert_and_append_take_a_forward_without_required_inputs(
    kind: type[AnyInputs], inputs: torch.Tensor | None
) -> None:
    model, x = kind(), torch.randn(3, 4)
    hidden = model.net[1](model.net[0](x))
    assert identical(regraft.truncate(model, after="net.1", inputs=inputs)(x), hidden)
    assert regraft.append(model, 5, inputs=inputs)(x).shape == (3, 5)
    inserted = regraft.insert(model, nn.Tanh(), after="net.1", inputs=inputs)
    assert identical(inserted(x), model.net[2](hidden.tanh()))


def test_capture_takes_the_inputs_that_are_given() -> None:
    x, scale = torch.randn(3, 4), torch.randn(3, 1)
    flow = capture(Optional(), arguments=Arguments((x,), {"scale": scale}))
    assert [node.name for node in flow.graph.nodes if node.op == "placeholder"] == ["x", "scale"]
    edited = regraft.insert(Optional(), nn.Identity(), after="net.1", inputs={"x": x, "scale": scale})
    assert edited(x, scale).shape == (3, 2)


def test_capture_says_what_a_forward_takes() -> None:
    with pytest.raises(ModelError, match=r"do not fit the forward of Optional: too many positional.*It takes"):
        capture(Optional(), arguments=Arguments((torch.zeros(1, 4), torch.zeros(1))))


def test_truncate_of_data_parallel() -> None:
    model = nn.DataParallel(AnyInputs().net)
    x = torch.randn(3, 4)
    assert identical(regraft.truncate(model, after="module.0", inputs=x)(x), model.module[0](x))
