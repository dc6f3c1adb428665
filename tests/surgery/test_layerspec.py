import json

import pytest
import torch
from torch import nn

import tiny
from regraft.errors import EditError
from regraft.surgery.layerspec import construct, describe

LAYERS = [
    nn.Linear(3, 4, bias=False),
    nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=2, groups=2, bias=False, padding_mode="reflect"),
    nn.Conv2d(4, 8, 3, padding="same"),
    nn.ConvTranspose2d(4, 8, 2, stride=2, output_padding=1),
    nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False),
    nn.BatchNorm1d(4, track_running_stats=False),
    nn.LayerNorm((4, 5), elementwise_affine=False),
    nn.GroupNorm(2, 4),
    nn.Dropout(0.3),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.GELU(approximate="tanh"),
    nn.PReLU(3),
    nn.Softmax(dim=1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d((2, 3)),
    nn.AdaptiveAvgPool2d((1, None)),
    nn.Flatten(2),
    nn.Upsample(scale_factor=2.0, mode="bilinear"),
    nn.Identity(),
    nn.Tanh(),
    nn.Embedding(5, 3, padding_idx=0),
    nn.Sequential(),
    tiny.sequential(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_what_is_described_is_built_again(layer: nn.Module) -> None:
    built = construct(json.loads(json.dumps(describe(layer))))
    assert repr(built) == repr(layer)
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes


def test_one_layer_in_several_places_is_described_in_each() -> None:
    model = tiny.sequential()
    assert construct(describe(model)).eval()(tiny.batch("sequential")).min() >= 0  # the last activation is there
    assert [name for name, _ in describe(model)["layers"]] == [str(n) for n in range(9)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (tiny.NoisyBlock(3), "a layer of type tiny.NoisyBlock cannot be written into a recipe"),
        (nn.Sequential(nn.ReLU(), tiny.NoisyBlock(3)), "tiny.NoisyBlock"),
        (nn.LSTM(2, 3), "a layer of type LSTM does not say which arguments it was built with"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "ParametrizedLinear"),
        (nn.TransformerEncoderLayer(4, 2, 8), "the argument 'd_model' of TransformerEncoderLayer cannot be read back"),
    ],
    ids=["own class", "own class inside", "var args", "parametrized", "lost arguments"],
)
def test_what_cannot_be_described_is_an_error(layer: nn.Module, message: str) -> None:
    with pytest.raises(EditError) as caught:
        describe(layer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"type": "system", "arguments": {}}, "'system' is no layer of torch.nn"),
        ({"type": "Parameter", "arguments": {}}, "'Parameter' is no layer of torch.nn"),
        ({"type": "__class__", "arguments": {}}, "'__class__' is no layer of torch.nn"),
        ({"type": "functional", "arguments": {}}, "'functional' is no layer of torch.nn"),
        ({}, "'' is no layer of torch.nn"),
        ({"type": "Linear", "arguments": {"wings": 2}}, "a recipe describes a Linear that cannot be built"),
        ({"type": "Linear"}, "a recipe describes a Linear that cannot be built"),
    ],
)
def test_a_description_of_anything_else_is_refused(description: dict[str, object], message: str) -> None:
    with pytest.raises(EditError) as caught:
        construct(description)
    assert message in str(caught.value)


def test_building_draws_no_more_than_the_weights() -> None:
    torch.manual_seed(1)
    built = construct({"type": "Linear", "arguments": {"in_features": 3, "out_features": 2}})
    torch.manual_seed(1)
    assert torch.equal(built.weight, nn.Linear(3, 2).weight)
