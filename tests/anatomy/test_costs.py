"""Sizes and costs of whole architectures against torch's counter, torchinfo and hooks on a real forward."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchinfo
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import tiny
from anatomy.networks import SharesLayers
from regraft import summary

ROOT = Path(__file__).parents[2]
TORCHVISION = {
    "resnet50": 96,
    "mobilenet_v3_large": 96,
    "densenet121": 96,
    "efficientnet_b0": 96,
    "regnet_y_400mf": 96,
    "shufflenet_v2_x1_0": 96,
    "squeezenet1_1": 96,
    "googlenet": 96,
    "inception_v3": 128,
    "convnext_tiny": 96,
    "swin_t": 224,
    "vit_b_16": 224,
}
TIMM = {
    "vit_tiny_patch16_224": 224,
    "levit_128s": 224,
    "pit_ti_224": 224,
    "convnext_atto": 96,
    "mobilevit_xxs": 128,
    "regnetx_002": 96,
    "xcit_nano_12_p16_224": 224,
    "poolformer_s12": 96,
}
ARCHITECTURES = [
    *((f"torchvision/{name}", side) for name, side in TORCHVISION.items()),
    *((f"timm/{name}", side) for name, side in TIMM.items()),
]


def build(name: str) -> nn.Module:
    library, _, bare = name.partition("/")
    if library == "timm":
        return timm.create_model(bare).eval()
    settled = {"init_weights": False} if bare in ("inception_v3", "googlenet") else {}
    return models.get_model(bare, **settled).eval()


def measured(model: nn.Module, side: int) -> tuple[int, int]:
    """Return multiply-adds and the bytes that came out of calls inside of which no layer was called, of a real run."""
    model = copy.deepcopy(model).requires_grad_(False)  # torch's counter stumbles over some models with gradients
    counter, leaf_bytes, called = FlopCounterMode(display=False), [], [0]

    def begin(*_: object) -> None:
        called[-1] += 1
        called.append(0)

    def end(_: nn.Module, __: object, out: object) -> None:
        if called.pop() == 0:
            tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            leaf_bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    for module in model.modules():
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            model(torch.randn(1, 3, side, side))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops() // 2, sum(leaf_bytes)


@pytest.mark.parametrize(("name", "side"), ARCHITECTURES)
def test_summary_counts_multiply_adds_parameters_and_bytes(name: str, side: int) -> None:
    model = build(name)
    found = summary(model, (1, 3, side, side))
    root = found.layers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchinfo.summary(model, verbose=0).summary_list[0]
    assert (root.multiply_adds, root.activation_bytes) == measured(model, side)
    assert (root.parameters, root.trainable) == (theirs.num_params, theirs.trainable_params)
    assert root.buffers == sum(buffer.numel() for buffer in model.buffers())
    assert (found.problem, found.note) == (None, None)


def test_summary_adds_up_bytes_of_outputs_over_calls() -> None:
    found = {layer.path: layer for layer in summary(SharesLayers(), (2, 4)).layers}
    assert found["block.0"].activation_bytes == 3 * 2 * 4 * 4
    assert found["block"].activation_bytes == 3 * 2 * 4 * 4
    assert found["head"].activation_bytes == 2 * 2 * 4
    assert found[""].activation_bytes == 2 * (3 * 2 * 4 * 4) + 2 * 2 * 4


def test_summary_totals_are_those_of_the_model_itself() -> None:
    model = tiny.build("plain")
    found = summary(model)
    as_data = json.loads(json.dumps(found.to_dict()))
    root = as_data["layers"][0]
    totals = ("parameters", "trainable", "buffers", "multiply_adds", "activation_bytes")
    assert {name: as_data[name] for name in totals} == {name: root[name] for name in totals}
    assert root["buffers"] == sum(buffer.numel() for buffer in model.buffers())


LAZY = {
    "image": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5)),
    "twice": lambda: (lambda layer: nn.Sequential(nn.LazyConv2d(3, 1), layer, nn.Flatten(), layer))(nn.ReLU()),
}


@pytest.mark.parametrize("name", LAZY)
def test_summary_counts_lazy_layers_and_leaves_them_lazy(name: str) -> None:
    model, reference = LAZY[name](), LAZY[name]()
    found = summary(model, (1, 3, 8, 8))
    lazy = [module for module in model.modules() if isinstance(module, nn.modules.lazy.LazyModuleMixin)]
    assert lazy
    assert all(layer.has_uninitialized_params() for layer in lazy)  # pyright: ignore
    reference(torch.randn(1, 3, 8, 8))
    expected = summary(reference, (1, 3, 8, 8)).to_dict()
    ours = found.to_dict()
    for layer, other in zip(ours["layers"], expected["layers"], strict=True):
        layer.pop("lazy"), other.pop("lazy")
        assert layer.pop("type").removeprefix("Lazy") == other.pop("type")
    assert ours == expected
    model(torch.randn(1, 3, 8, 8))  # the model's own first forward still works


def test_summary_of_a_lazy_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    found = {layer.path: layer for layer in summary(Twice(), (2, 4)).layers}
    assert (found["layer"].calls, found["layer"].parameters, found["layer"].unknown) == (2, 20, 0)


def test_summary_says_where_sizes_of_lazy_layers_stay_unknown() -> None:
    found = summary(nn.Sequential(nn.LazyLinear(3), nn.Linear(4, 2)))
    assert found.problem is not None
    assert (found.layers[0].parameters, found.layers[0].unknown, found.layers[1].state) == (10, 2, "trainable")
    assert "10 + ?" in str(found)


def test_summary_of_a_billion_parameters_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(16)))
    found = summary(model)
    assert found.layers[0].parameters == 16 * 8192**2 > 10**9
    assert found.layers[0].multiply_adds == 16 * 8192**2


@pytest.mark.slow
def test_summary_of_seven_billion_parameters_takes_twenty_seconds_and_two_gibibytes() -> None:
    pytest.importorskip("transformers")
    benchmark = "import sys, json; sys.path.insert(0, 'benchmarks'); import summary; print(summary.LARGE)"
    script = subprocess.run([sys.executable, "-c", benchmark], cwd=ROOT, capture_output=True, text=True, check=True)
    run = subprocess.run([sys.executable, "-c", script.stdout], capture_output=True, text=True, check=True)
    large = json.loads(run.stdout)
    h, layers, wide, words = 4096, 32, 11008, 32000
    assert large["parameters"] == 2 * words * h + layers * (4 * h * h + 3 * h * wide + 2 * h) + h
    assert large["note"] is None
    assert large["seconds"] <= 20
    assert large["peak_gib"] <= 2
