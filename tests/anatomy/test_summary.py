import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
import torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import tiny
from oracles import identical, same, snapshot
from regraft import create_model, freeze, summary
from regraft.errors import ModelError

COUNTED = ("resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1", "efficientnet_b0", "shufflenet_v2_x0_5")
COSTED = ("resnet18", "mobilenet_v3_small", "densenet121", "regnet_y_400mf")


def by_path(model: nn.Module, size: tuple[int, ...] | None = None) -> dict[str, object]:
    return {layer.path: layer for layer in summary(model, size).layers}


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.mark.parametrize("name", COUNTED)
def test_summary_counts_parameters_as_torchinfo_does(name: str) -> None:
    model = models.get_model(name)
    freeze(model, "children[:1]")
    ours, theirs = by_path(model), {}
    for layer in torchinfo.summary(model, verbose=0).summary_list:
        theirs[id(layer.module)] = (layer.num_params, layer.trainable_params)
    for path, module in model.named_modules():
        found = ours[path]
        if id(module) in theirs:
            assert (found.parameters, found.trainable) == theirs[id(module)], path
    assert set(ours) == {path for path, _ in model.named_modules()}


@pytest.mark.parametrize("name", COSTED)
def test_summary_multiply_adds_are_half_of_torchs_floating_point_operations(name: str) -> None:
    model = models.get_model(name).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.randn(1, 3, 96, 96))
    root, *layers = summary(model, (1, 3, 96, 96)).layers
    assert root.multiply_adds == counter.get_total_flops() // 2
    assert sum(layer.multiply_adds or 0 for layer in layers if layer.depth == 1) <= root.multiply_adds


def test_summary_counts_multiply_adds_of_attention_without_the_fused_kernel() -> None:
    model = tiny.build("root-token").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), without_fused_attention(), counter:
        model(torch.randn(1, 3, tiny.SIDE, tiny.SIDE))
    assert summary(model).layers[0].multiply_adds == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", [*tiny.ALL, "resnet18", "mobilenet_v3_small"])
def test_summary_output_shapes_are_those_of_forward_hooks(name: str) -> None:
    is_tiny = name in tiny.ALL
    model = (tiny.build(name) if is_tiny else models.get_model(name)).eval()
    inputs = tiny.batch(name, count=2) if is_tiny else torch.randn(2, 3, 64, 64)
    seen: dict[str, tuple[int, ...]] = {}

    def note(path: str, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(path, tuple((out[0] if isinstance(out, tuple) else out).shape))

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, path=path: note(path, out))
    with torch.no_grad(), without_fused_attention():
        model(inputs)
    ours = {layer.path: layer.output_shape for layer in summary(model, tuple(inputs.shape)).layers}
    assert {path: shape for path, shape in ours.items() if shape is not None} == seen


def test_summary_order_is_that_of_execution_and_not_of_registration() -> None:
    layers = by_path(tiny.build("residual"))
    order = [layers[path].order for path in tiny.Residual.execution]
    assert order == sorted(order)
    assert layers["head"].order == max(layer.order for layer in layers.values() if layer.order is not None)


def test_summary_has_no_order_and_no_shape_of_a_layer_that_is_not_called() -> None:
    aux = by_path(tiny.build("aux-head"))["aux"]
    assert (aux.order, aux.output_shape, aux.parameters) == (None, None, 35)


def mix_modes(model: nn.Module) -> None:
    """Give every other module a training flag that differs from its parent's."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
@pytest.mark.parametrize("name", tiny.ALL)
def test_summary_changes_nothing(name: str, fails: bool, random_state: Callable[[], tuple[object, ...]]) -> None:
    model = tiny.build(name)
    freeze(model, "children[:1]") if name != "input-norm" else freeze(model, "conv")
    mix_modes(model)
    model.register_forward_hook(lambda *_: pytest.fail("a hook of the model was called"))
    next(model.children()).register_forward_pre_hook(lambda *_: pytest.fail("a hook of the model was called"))
    next(p for p in model.parameters() if p.requires_grad).grad = None
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    before, state = snapshot(model), random_state()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    if fails:
        with pytest.raises(ModelError):
            summary(model, (2, 7))
    else:
        size = tuple(tiny.batch(name).shape)
        assert summary(model, size).layers[0].output_shape == (size[0], tiny.CLASSES)
    assert same(before, snapshot(model))
    assert random_state() == state
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("size", "layer", "shape"),
    [((1, 4, 8, 8), "conv1", "(1, 4, 8, 8)"), ((1, 3, 10, 10), "fc", "(1, 200)")],
    ids=["channels", "side"],
)
def test_summary_names_the_layer_that_fails_and_the_shape_it_was_given(
    size: tuple[int, ...], layer: str, shape: str
) -> None:
    with pytest.raises(ModelError) as caught:
        summary(tiny.build("plain"), size)
    message = str(caught.value)
    assert f"layer '{layer}'" in message
    assert shape in message
    assert "Pass the input_size that it expects" in message


def test_summary_without_an_input_size_says_why_a_model_cannot_run() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("two inputs, please")

    found = summary(Picky())
    assert found.problem is not None
    assert "two inputs, please" in found.problem
    assert found.layers[0].parameters == 10
    assert found.layers[0].multiply_adds is None
    assert "shapes unknown" in str(found)


@pytest.mark.parametrize("name", ["plain", "root-token", "tied"])
def test_summary_is_the_same_on_the_meta_device_and_on_the_cpu(name: str) -> None:
    with torch.device("meta"):
        on_meta = tiny.ALL[name]()
    assert summary(on_meta).to_dict() == summary(tiny.build(name)).to_dict()
    assert all(parameter.is_meta for parameter in on_meta.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", tiny.ALL)
def test_summary_is_the_same_in_another_precision(name: str, dtype: torch.dtype) -> None:
    found, reference = summary(tiny.build(name).to(dtype)).to_dict(), summary(tiny.build(name)).to_dict()
    ratio = dtype.itemsize / torch.float32.itemsize
    for ours, theirs in zip([found, *found["layers"]], [reference, *reference["layers"]], strict=True):
        if theirs["activation_bytes"] is not None:
            assert ours.pop("activation_bytes") == ratio * theirs.pop("activation_bytes")
    assert found == reference


def test_summary_counts_a_shared_parameter_once() -> None:
    model = tiny.build("tied")
    assert (
        summary(model).layers[0].parameters == len({id(p) for p in model.parameters()})
        and (summary(model).layers[0].parameters)
    ) or summary(model).layers[0].parameters == sum(p.numel() for p in set(model.parameters()))


@pytest.mark.parametrize(
    ("pattern", "states"),
    [((), {"": "frozen", "conv1": "frozen", "dropout": "no parameters"}), (("conv*",), {"": "partly frozen"})],
)
def test_summary_states_follow_the_flags(pattern: tuple[str, ...], states: dict[str, str]) -> None:
    model = tiny.build("plain")
    freeze(model, *pattern)
    found = by_path(model)
    assert {path: found[path].state for path in states} == states


def test_summary_depth_limits_what_is_shown_but_not_what_is_known() -> None:
    model = create_model("resnet18", weights="none")
    shallow, full = summary(model, depth=1), summary(model)
    assert shallow.layers == full.layers
    assert [layer.path for layer in shallow.shown[1:]] == [name for name, _ in model.named_children()]
    assert len(str(shallow).splitlines()) == 1 + 11 + 2
    assert shallow._repr_html_().count("<b>") == 11


def test_summary_does_not_read_the_weights() -> None:
    model = tiny.build("plain")
    reference = summary(model).to_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert summary(model).to_dict() == reference
    assert all(identical(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["pit_ti_224", "levit_128s"])
def test_summary_of_networks_that_pass_tuples_between_layers(name: str) -> None:
    model = timm.create_model(name)
    assert summary(model).layers[0].output_shape == (1, 1000)
