"""Every class of torch.nn: its description is a fixed point, and what it builds is equal, bit for bit."""

import types
from typing import Any

import pytest
import torch
from timm import layers as timm_layers
from torch import nn
from torch.nn.parameter import is_lazy
from torchvision import ops

from regraft.surgery.layer_text.build import construct, describe

# The text, and the shapes of inputs it is run with; none where it is not run.
LAYERS: dict[str, tuple[Any, ...]] = {
    "Linear(3, 4)": ((2, 3),),
    "Linear(3, 4, bias=False)": ((2, 3),),
    "Bilinear(2, 3, 4)": ((5, 2), (5, 3)),
    "Identity()": ((2, 3),),
    "Conv1d(4, 8, 3, padding='same')": ((2, 4, 9),),
    "Conv2d(4, 8, 7, stride=2, padding=3, bias=False)": ((2, 4, 9, 9),),
    "Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=2, groups=2, bias=False, padding_mode='reflect')": (
        (2, 4, 9, 9),
    ),
    "Conv3d(2, 4, 3, groups=2)": ((1, 2, 5, 5, 5),),
    "ConvTranspose1d(4, 2, 3)": ((2, 4, 5),),
    "ConvTranspose2d(4, 8, 2, stride=2, output_padding=1)": ((2, 4, 5, 5),),
    "ConvTranspose3d(2, 2, 3, dilation=2)": ((1, 2, 5, 5, 5),),
    "LazyLinear(10)": (),
    "LazyLinear(10, bias=False)": (),
    "LazyConv2d(8, 3, stride=2, padding_mode='circular')": (),
    "LazyConvTranspose2d(8, 3)": (),
    "LazyBatchNorm2d(eps=0.001)": (),
    "BatchNorm1d(4)": ((3, 4),),
    "BatchNorm1d(4, track_running_stats=False)": ((3, 4),),
    "BatchNorm2d(4, eps=0.001, momentum=None, affine=False)": ((3, 4, 2, 2),),
    "BatchNorm3d(2, momentum=0.2)": ((3, 2, 2, 2, 2),),
    "SyncBatchNorm(4)": (),
    "InstanceNorm2d(4, affine=True)": ((3, 4, 2, 2),),
    "LayerNorm(5)": ((2, 5),),
    "LayerNorm((4, 5), elementwise_affine=False)": ((2, 4, 5),),
    "GroupNorm(2, 4, affine=False)": ((2, 4, 3),),
    "RMSNorm(5, eps=0.001)": ((2, 5),),
    "LocalResponseNorm(2, alpha=0.1)": ((2, 4, 3),),
    "Dropout(p=0.3)": ((2, 4),),
    "Dropout1d()": ((2, 4, 3),),
    "Dropout2d(p=0.1, inplace=True)": ((2, 4, 3, 3),),
    "Dropout3d(p=0)": ((2, 4, 3, 3, 3),),
    "AlphaDropout(p=0.2)": ((2, 4),),
    "FeatureAlphaDropout()": ((2, 4),),
    "ReLU(inplace=True)": ((2, 4),),
    "ReLU6()": ((2, 4),),
    "LeakyReLU(negative_slope=0.2)": ((2, 4),),
    "PReLU(num_parameters=4, init=0.1)": ((2, 4),),
    "RReLU(lower=0.1)": ((2, 4),),
    "ELU(alpha=0.5)": ((2, 4),),
    "CELU()": ((2, 4),),
    "SELU()": ((2, 4),),
    "SiLU()": ((2, 4),),
    "Mish()": ((2, 4),),
    "GELU(approximate='tanh')": ((2, 4),),
    "GLU(dim=1)": ((2, 4),),
    "Sigmoid()": ((2, 4),),
    "LogSigmoid()": ((2, 4),),
    "Tanh()": ((2, 4),),
    "Tanhshrink()": ((2, 4),),
    "Hardtanh(min_val=-2.0, max_val=1e999)": ((2, 4),),
    "Hardswish()": ((2, 4),),
    "Hardsigmoid()": ((2, 4),),
    "Hardshrink(lambd=0.3)": ((2, 4),),
    "Softshrink(lambd=0.3)": ((2, 4),),
    "Softplus(beta=2.0)": ((2, 4),),
    "Softsign()": ((2, 4),),
    "Softmax(dim=1)": ((2, 4),),
    "Softmax2d()": ((2, 4, 3, 3),),
    "Softmin(dim=1)": ((2, 4),),
    "LogSoftmax(dim=-1)": ((2, 4),),
    "Threshold(0.1, -2)": ((2, 4),),
    "MaxPool1d(2)": ((2, 4, 6),),
    "MaxPool2d(3, stride=2, ceil_mode=True)": ((2, 4, 6, 6),),
    "MaxPool2d((3, 3))": ((2, 4, 6, 6),),
    "MaxPool3d(2, padding=1)": ((1, 2, 4, 4, 4),),
    "AvgPool1d((2,))": ((2, 4, 6),),
    "AvgPool2d((2, 3))": ((2, 4, 6, 6),),
    "AvgPool2d(2, divisor_override=3)": ((2, 4, 6, 6),),
    "AvgPool3d(2)": ((1, 2, 4, 4, 4),),
    "LPPool2d(2, 3)": ((2, 4, 6, 6),),
    "FractionalMaxPool2d((2, 2), output_ratio=(0.5, 0.5))": ((2, 4, 6, 6),),
    "MaxUnpool2d((2, 2))": (),
    "AdaptiveAvgPool1d(2)": ((2, 4, 6),),
    "AdaptiveAvgPool2d((1, None))": ((2, 4, 6, 6),),
    "AdaptiveMaxPool2d(1, return_indices=True)": ((2, 4, 6, 6),),
    "AdaptiveAvgPool3d(1)": ((1, 2, 4, 4, 4),),
    "ZeroPad2d(1)": ((2, 4, 6, 6),),
    "ZeroPad2d((1, 2, 3, 4))": ((2, 4, 6, 6),),
    "ConstantPad1d(2, -0.5)": ((2, 4, 6),),
    "ReflectionPad2d(1)": ((2, 4, 6, 6),),
    "ReplicationPad3d(1)": ((1, 2, 4, 4, 4),),
    "CircularPad2d(2)": ((2, 4, 6, 6),),
    "Upsample(scale_factor=2.0, mode='bilinear')": ((2, 4, 6, 6),),
    "Upsample(size=(5, 7))": ((2, 4, 6, 6),),
    "UpsamplingNearest2d(scale_factor=2.0)": ((2, 4, 6, 6),),
    "PixelShuffle(2)": ((2, 4, 6, 6),),
    "PixelUnshuffle(2)": ((2, 4, 6, 6),),
    "ChannelShuffle(2)": ((2, 4, 6, 6),),
    "Flatten(start_dim=2)": ((2, 4, 6, 6),),
    "Unflatten(1, (2, 3))": ((2, 6),),
    "Fold((4, 4), 2)": ((1, 8, 9),),
    "Unfold((2, 2), stride=2)": ((2, 4, 6, 6),),
    "Embedding(5, 3, padding_idx=0, max_norm=1.0)": (torch.tensor([[0, 1, 4]]),),
    "EmbeddingBag(5, 3, mode='max')": (torch.tensor([[0, 1, 4]]),),
    "RNN(2, 3, nonlinearity='relu')": ((4, 1, 2),),
    "LSTM(2, 3, num_layers=2, bias=False, batch_first=True, dropout=0.2, bidirectional=True)": ((4, 1, 2),),
    "LSTM(2, 4, proj_size=2)": (),
    "GRU(2, 3)": ((4, 1, 2),),
    "RNNCell(2, 3, nonlinearity='relu')": ((4, 2),),
    "LSTMCell(2, 3, bias=False)": ((4, 2),),
    "GRUCell(2, 3)": ((4, 2),),
    "MultiheadAttention(8, 2)": ((3, 1, 8), (3, 1, 8), (3, 1, 8)),
    "MultiheadAttention(8, 2, dropout=0.1, bias=False, add_bias_kv=True, kdim=4, vdim=6, batch_first=True)": (
        *((1, 3, 8), (1, 3, 4), (1, 3, 6)),
    ),
    "TransformerEncoderLayer(8, 2)": ((3, 1, 8),),
    "TransformerEncoderLayer(8, 2, dim_feedforward=4, dropout=0.2, activation='gelu', norm_first=True, bias=False)": (
        (3, 1, 8),
    ),
    "TransformerEncoderLayer(8, 2, dim_feedforward=4, activation=LeakyReLU(), batch_first=True)": ((1, 3, 8),),
    "TransformerDecoderLayer(8, 2, dim_feedforward=4, layer_norm_eps=0.001)": ((3, 1, 8), (3, 1, 8)),
    "TransformerEncoder(TransformerEncoderLayer(8, 2, dim_feedforward=4, batch_first=True), 2, norm=LayerNorm(8))": (
        (1, 3, 8),
    ),
    "TransformerDecoder(TransformerDecoderLayer(8, 2, dim_feedforward=4), 2)": ((3, 1, 8), (3, 1, 8)),
    "Transformer(d_model=8, nhead=2, num_encoder_layers=1, dim_feedforward=4, batch_first=True)": (
        (1, 3, 8),
        (1, 3, 8),
    ),
    "AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], div_value=2.0)": ((2, 8), torch.tensor([1, 12])),
    "CosineSimilarity(dim=0)": ((2, 4), (2, 4)),
    "PairwiseDistance(p=1.0)": ((2, 4), (2, 4)),
    "CrossEntropyLoss(label_smoothing=0.1)": ((2, 4), torch.tensor([1, 3])),
    "HuberLoss(reduction='sum')": ((2, 4), (2, 4)),
    "Sequential()": ((2, 3),),
    "Sequential(Linear(8, 4, bias=False), ReLU())": ((2, 8),),
    "Sequential(first=Linear(3, 4), second=Sequential(Tanh()))": ((2, 3),),
    "Sequential({'0': Linear(3, 4), 'my-layer': Tanh(), 'class': ReLU()})": ((2, 3),),
    "ModuleList()": (),
    "ModuleList([Linear(3, 4), ReLU()])": (),
    "ModuleDict({'a': ReLU(), 'b c': ModuleList([Linear(1, 1)])})": (),
    "timm.layers.LayerNorm2d(6)": ((2, 6, 3, 3),),
    "timm.layers.DropPath(drop_prob=0.1)": ((2, 6),),
    "timm.layers.BatchNormAct2d(4)": ((2, 4, 3, 3),),
    "timm.layers.Mlp(8, hidden_features=16, out_features=8, drop=0.1)": ((2, 8),),
    "timm.layers.LayerScale(8)": ((2, 8),),
    "timm.layers.GroupNorm1(8)": ((2, 8, 3, 3),),
    "timm.layers.Conv2dSame(3, 4, 3, stride=2)": ((2, 3, 5, 5),),
    "torchvision.ops.Conv2dNormActivation(3, 4, stride=2)": ((2, 3, 5, 5),),
    "torchvision.ops.SqueezeExcitation(8, 2)": ((2, 8, 3, 3),),
    "torchvision.ops.StochasticDepth(0.1, 'row')": ((2, 6),),
    "torchvision.ops.Permute([0, 2, 1])": ((2, 3, 4),),
}


def shapes(layer: nn.Module) -> dict[str, Any]:
    tensors = layer.state_dict(keep_vars=True)
    return {name: "lazy" if is_lazy(tensor) else tensor.shape for name, tensor in tensors.items()}


def outputs(layer: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    found = layer(*(tensor.clone() for tensor in inputs))
    flat: list[Any] = [found]
    while not all(isinstance(item, torch.Tensor) for item in flat):
        flat = [part for item in flat for part in ((item,) if isinstance(item, torch.Tensor) else item or ())]
    return flat


@pytest.mark.parametrize(("text", "sizes"), LAYERS.items(), ids=list(LAYERS))
def test_describe_is_a_fixed_point_and_construct_builds_an_equal_layer(text: str, sizes: tuple[Any, ...]) -> None:
    # Python itself says which layer a text stands for.
    layer = eval(text.replace("Sequential(first", "named(first").replace("Sequential({", "named(**{"), SCOPE)
    assert describe(layer) == text
    built = construct(text)
    assert describe(built) == text
    assert shapes(built) == shapes(layer)
    assert repr(built) == repr(layer)
    assert [(name, type(part)) for name, part in built.named_modules()] == [
        (name, type(part)) for name, part in layer.named_modules()
    ]
    if sizes:
        built.load_state_dict(layer.state_dict())
        inputs = [torch.randn(size) if isinstance(size, tuple) else size for size in sizes]
        for training in (True, False):
            ours, theirs = outputs(built.train(training), inputs), outputs(layer.train(training), inputs)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _named(**layers: nn.Module) -> nn.Sequential:
    sequential = nn.Sequential()
    for name, layer in layers.items():
        sequential.add_module(name, layer)
    return sequential


SCOPE = {
    **vars(nn),
    "named": _named,
    "timm": types.SimpleNamespace(layers=timm_layers),
    "torchvision": types.SimpleNamespace(ops=ops),
}


def test_describe_cases_cover_every_class_of_torch_nn() -> None:
    kinds = {name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    named = {name for name in kinds if any(f"{name}(" in text for text in LAYERS)}
    rest = kinds - named
    families = ("Loss", "Loss2d", "1d", "2d", "3d")  # others of a family, one of which stands in the list
    assert {name for name in rest if not name.endswith(families)} == (
        {"Container", "DataParallel", "Module", "ParameterDict", "ParameterList", "RNNBase", "RNNCellBase"} & kinds
    )
