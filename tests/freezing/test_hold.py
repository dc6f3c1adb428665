"""Every kind of layer that has state: frozen it is bit-identical and gives the same, thawed it trains as if untouched.

The rest of the network is trained by hand with momentum, weight decay and bfloat16. The oracle of what thawing gives is
a second network that was never frozen.
"""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import regraft
from freezing.layers_with_state import LAYERS, QUIET, Codebook, build, embedding, image, indices, tensors, train, vector
from oracles import identical
from regraft import audit, freeze, unfreeze
from regraft.freezing.hold import PIN_HOOKS

pytestmark = QUIET


@pytest.mark.parametrize("name", LAYERS)
def test_freeze_keeps_layers_bit_identical_and_their_outputs_the_same(name: str) -> None:
    model, inputs = build(name), LAYERS[name][1]()
    freeze(model, "0")
    before, expected = tensors(model[0]), model.train()[0](inputs).detach()
    train(model, name, seed=1)
    model.eval()(inputs)
    with torch.inference_mode():
        model(inputs)
    after = tensors(model[0])
    assert [key for key in before if not identical(before[key], after[key])] == []
    assert identical(model.train()[0](inputs), expected)
    assert audit(model) == []


@pytest.mark.parametrize("name", LAYERS)
def test_unfreeze_lets_training_be_that_of_a_network_that_was_never_frozen(name: str) -> None:
    model, untouched = build(name), build(name)
    freeze(model, "0")
    train(model, name, seed=1)
    with torch.no_grad():
        for own, other in zip(untouched[2].parameters(), model[2].parameters(), strict=True):
            own.copy_(other)
    if name == "codebook, registered late":  # which only its first forward makes
        assert tensors(model).keys() == tensors(untouched).keys()
    unfreeze(model)
    for layer, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(layer).keys() == vars(other).keys()
        assert not any(
            hook in PIN_HOOKS for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
        )
    before = tensors(model[0])
    train(model, name, seed=2)
    train(untouched, name, seed=2)
    after, expected = tensors(model), tensors(untouched)
    assert [key for key in expected if not identical(after[key], expected[key])] == []
    assert any(not identical(before[key], after[f"0.{key}"]) for key in before)


@pytest.mark.parametrize("name", ["Embedding, max_norm", "Embedding, max_norm and padding", "EmbeddingBag, max_norm"])
def test_freeze_keeps_what_max_norm_of_an_embedding_gives(name: str) -> None:
    model, reference, inputs = build(name), build(name), indices()
    freeze(model, "0")
    assert identical(model[0](inputs), reference[0](inputs))


def test_freeze_takes_an_embedding_with_max_norm_that_is_tied_to_a_projection() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.between = embedding(nn.Embedding(10, 4, max_norm=1.0)), nn.Linear(4, 4)
            self.scores = nn.Linear(4, 10, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores(self.between(self.words(x)))

    model = Tied()
    before = model.words.weight.clone()
    freeze(model, "words")
    model.train()(indices()).sum().backward()
    assert identical(before, model.words.weight)
    assert model.between.weight.grad is not None


class Around(nn.Module):
    """Writes to the buffers of a layer inside in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.book, self.out = nn.Conv2d(3, 3, 1), Codebook("never"), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        if self.training:
            self.book.codes.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.out(self.book(x).mean((2, 3)))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [Around, lambda: NetWith("in training"), lambda: NetWith("always")])
@pytest.mark.parametrize("patterns", [("front", "book"), ("book",), ("re:front|book",), ("type:Codebook",)])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, saved_and_loaded], ids=["", "copy", "file"])
def test_freeze_by_path_takes_layers_with_buffers_alone(
    make: Callable[[], nn.Module], patterns: tuple[str, ...], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = make()
    freeze(model, *patterns)
    model = copied(model).train()
    before = model.book.codes.clone()
    model(image()).sum().backward()
    assert identical(before, model.book.codes)
    assert audit(model) == []
    unfreeze(model, "book")
    model.train()(image())
    assert not identical(before, model.book.codes)


class NetWith(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.front, self.book, self.out = nn.Conv2d(3, 3, 1), Codebook(how), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.book(self.front(x)).mean((2, 3)))


def test_freeze_until_holds_layers_with_buffers_alone_and_unfreeze_since_lets_go() -> None:
    model = NetWith("in training")
    freeze(model, until="book", inputs=image())
    before = model.book.codes.clone()
    model.train()(image())
    assert identical(before, model.book.codes)
    unfreeze(model, since="book", inputs=image())
    model.train()(image())
    assert not identical(before, model.book.codes)


def test_unfreeze_of_the_head_leaves_what_was_frozen_as_a_whole() -> None:
    model = NetWith("in training")
    freeze(model)
    unfreeze(model, "out")
    before = model.book.codes.clone()
    model.train()(image())
    assert identical(before, model.book.codes)


def test_freeze_leaves_values_that_are_loaded_into_a_frozen_layer() -> None:
    model, other = NetWith("always"), NetWith("always")
    freeze(model, "front", "book")
    model.train()(image())
    model.load_state_dict(other.state_dict())
    model(image())
    assert identical(model.book.codes, other.book.codes)
    assert identical(model.front.weight, other.front.weight)


def test_freeze_puts_state_back_after_a_forward_that_fails() -> None:
    model = NetWith("always")
    freeze(model, "front", "book")
    before = model.book.codes.clone()
    with pytest.raises(RuntimeError):
        model.train()(torch.randn(2, 3, 4, 4).double())
    model.out = nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        model(image())
    assert identical(before, model.book.codes)


# ---- tools that average, reset, convert


# ---- TorchScript


# ---- networks whose `train` is their own


# ---- one layer in several places


@pytest.mark.parametrize("shared", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(8, affine=False), nn.RReLU])
def test_freeze_pins_a_layer_that_stands_in_a_frozen_and_a_trainable_part(shared: Callable[[], nn.Module]) -> None:
    layer = shared()
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8), nn.Linear(8, 8), layer, nn.Linear(8, 2))
    report = freeze(model, "0", "2")
    inputs, before = vector(), tensors(layer)
    model.train()(inputs)
    assert report.pinned == ("1",)
    assert identical(model[:3](inputs), model[:3](inputs))
    assert [key for key, value in tensors(layer).items() if not identical(before[key], value)] == []


def test_freeze_says_which_outputs_depend_on_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    report = freeze(model, "0", "1")
    assert report.follow_batch == ("1",)
    assert str(report).endswith("outputs still depend on the batch in: 1")
    assert "its output follows its batch" in str(regraft.summary(model))
    assert freeze(nn.BatchNorm2d(3)).follow_batch == ()
    assert freeze(nn.InstanceNorm2d(3, affine=True)).follow_batch == ()
