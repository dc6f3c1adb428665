"""A partly frozen transformer of torch's own trains and evaluates as with flags alone, whatever path it may take.

The oracle is the same network with `requires_grad_(False)` and the dropout of the frozen layers set to zero by hand.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oracles import identical
from regraft import audit, freeze, unfreeze

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

N, T, D = 2, 6, 16
PADDING = torch.tensor([[False] * T, [False] * (T - 2) + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "both": {"mask": torch.zeros(T, T, dtype=torch.bool), "src_key_padding_mask": PADDING},
}


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, **{"batch_first": True, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.TransformerEncoder(layer, 3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def without_dropout(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, nn.MultiheadAttention):
            layer.dropout = 0.0


def by_hand(model: nn.TransformerEncoder, layers: tuple[int, ...]) -> nn.TransformerEncoder:
    reference = copy.deepcopy(model)
    for number in layers:
        reference.layers[number].requires_grad_(False)
        without_dropout(reference.layers[number])
    return reference


def results(model: nn.Module, inputs: torch.Tensor, masks: dict[str, Any]) -> list[torch.Tensor]:
    """Return output and gradients in training, of inputs that are trained as well, then the output in evaluation."""
    torch.manual_seed(7)
    inputs = inputs.clone().requires_grad_(True)
    output = model.train()(inputs, **masks)
    output.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        return [output.detach(), inputs.grad, *gradients, model.eval()(inputs, **masks)]


@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"batch_first": False}, {"activation": "gelu", "bias": False}], ids=str
)
def test_freeze_of_an_encoder_layer_changes_no_value_and_no_gradient(
    options: dict[str, Any], layers: tuple[int, ...], masks: dict[str, Any]
) -> None:
    model = encoder(**options)
    reference = by_hand(model, layers)
    freeze(model, *(f"layers.{number}" for number in layers))
    inputs = torch.randn((N, T, D) if options.get("batch_first", True) else (T, N, D))
    ours, expected = results(model, inputs, masks), results(reference, inputs, masks)
    assert len(ours) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, expected, strict=True))
    assert audit(model) == []
    assert model.use_nested_tensor == reference.use_nested_tensor


def test_freeze_gives_zero_for_padding_in_evaluation_as_the_nested_path_does() -> None:
    model = encoder()
    reference = copy.deepcopy(model).eval()
    freeze(model, "layers.0")
    inputs = torch.randn(N, T, D)
    with torch.no_grad():
        output = model.eval()(inputs, src_key_padding_mask=PADDING)
        assert torch.allclose(output, reference(inputs, src_key_padding_mask=PADDING), atol=1e-5)
    assert not output[1, -2:].any()


def test_freeze_lets_evaluation_with_gradients_work_where_torch_alone_fails() -> None:
    model, inputs = encoder(), torch.randn(N, T, D)
    reference = by_hand(model, (0,)).train()  # the way that torch takes in training, without dropout
    without_dropout(reference)
    freeze(model, "layers.0")
    for network in (model.eval(), reference):
        network(inputs, src_key_padding_mask=PADDING)[~PADDING].square().sum().backward()
    for ours, theirs in zip(model.layers[1:].parameters(), reference.layers[1:].parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.layers[0].parameters())


@pytest.mark.parametrize("frozen", ["layers.0", "layers"])
def test_freeze_works_with_autocast_and_a_padding_mask(frozen: str) -> None:
    model, head = encoder(), nn.Linear(D, 2)
    freeze(model, frozen)
    before = [p.detach().clone() for p in model.layers[0].parameters()]
    for mode in (True, False) if frozen == "layers.0" else (True,):  # torch's nested path fails with it on a CPU
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(model.train(mode)(torch.randn(N, T, D), src_key_padding_mask=PADDING)).float().sum()
        loss.backward()
    assert all(identical(a, b) for a, b in zip(before, model.layers[0].parameters(), strict=True))


class Noisy(nn.TransformerEncoderLayer):
    """A layer of the user's own, whose forward draws."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.dropout(super().forward(*args, **kwargs), 0.5, self.training)


def test_freeze_pins_a_layer_of_ones_own_and_its_encoder_takes_no_nested_path() -> None:
    model = nn.TransformerEncoder(Noisy(D, 2, 2 * D, batch_first=True), 2)
    freeze(model, "layers.0")
    inputs = torch.randn(N, T, D)
    assert model.train()(inputs, src_key_padding_mask=PADDING).shape == (N, T, D)
    assert identical(model.layers[0](inputs), model.layers[0](inputs))
    assert not identical(model.layers[1](inputs), model.layers[1](inputs))


@pytest.mark.parametrize("act", [copy.deepcopy, lambda m: m], ids=["copy", "same"])
def test_freeze_puts_modes_back_that_were_assigned_by_hand_in_an_encoder(act: Callable[[nn.Module], nn.Module]) -> None:
    model = encoder()
    freeze(model, "layers.0")
    model = act(model)
    for layer in model.modules():
        layer.training = True
    seen: list[torch.Tensor] = []
    inputs = torch.randn(N, T, D)
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(inputs)
    model(inputs)
    assert identical(*seen)


def test_freeze_of_one_layer_works_in_its_encoder() -> None:
    model = encoder()
    reference = copy.deepcopy(model).train()
    without_dropout(reference)
    freeze(model.layers[0])
    inputs = torch.randn(N, T, D)
    model.train()(inputs, src_key_padding_mask=PADDING).sum().backward()
    with torch.no_grad():
        output = model.eval()(inputs, src_key_padding_mask=PADDING)
        assert torch.allclose(output[~PADDING], reference(inputs, src_key_padding_mask=PADDING)[~PADDING], atol=1e-5)


@pytest.mark.parametrize("frozen", [("encoder",), ("encoder.layers.0", "decoder.layers.0"), ("decoder",)])
def test_freeze_lets_a_whole_transformer_train(frozen: tuple[str, ...]) -> None:
    model = nn.Transformer(D, 2, 2, 2, 2 * D, batch_first=True)
    freeze(model, *frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {f"{word}_key_padding_mask": PADDING for word in ("src", "tgt", "memory")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model.train()(torch.randn(N, T, D), torch.randn(N, T, D), **masks).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert identical(before[name], parameter) != parameter.requires_grad, name
    with torch.no_grad():
        model.eval()(torch.randn(N, T, D), torch.randn(N, T, D), src_key_padding_mask=PADDING)


@pytest.mark.parametrize("self_attention", [True, False])
def test_freeze_lets_gradients_pass_a_frozen_attention(self_attention: bool) -> None:
    model = nn.ModuleDict({"embed": nn.Linear(D, D), "attention": nn.MultiheadAttention(D, 2, 0.5, batch_first=True)})
    freeze(model, "attention")
    reference = copy.deepcopy(model["embed"])
    still = copy.deepcopy(model["attention"]).eval()
    inputs = torch.randn(N, T, D)
    for embed, attention in ((model["embed"], model.train()["attention"]), (reference, still)):
        x = embed(inputs)
        attention(x, x if self_attention else inputs, x if self_attention else inputs)[0].square().sum().backward()
    assert torch.allclose(model["embed"].weight.grad, reference.weight.grad, atol=1e-5)


def test_unfreeze_leaves_no_trace_in_an_encoder() -> None:
    model, untouched = encoder(), encoder()
    freeze(model, "layers.0")
    model.train()(torch.randn(N, T, D), src_key_padding_mask=PADDING)
    unfreeze(model)
    for layer, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(layer).keys() == vars(other).keys()
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
