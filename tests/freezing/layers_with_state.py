"""Every kind of layer that has state, and a network of each, which is trained by hand."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

QUIET = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:_aminmax is deprecated"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


class Codebook(nn.Module):
    """Adds codes that follow its inputs, written as published code writes them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("codes", torch.randn(3), persistent=how != "not persistent")
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, mean = self.codes.clone(), x.detach().float().mean((0, 2, 3))
        if self.how == "in training" and self.training:
            self.codes.lerp_(mean, 0.1)
        if self.how in ("always", "not persistent"):
            self.calls += 1
            self.codes.mul_(0.9).add_(mean, alpha=0.1)
        if self.how == "by data":
            self.codes.data.lerp_(mean, 0.1)
        if self.how == "by assignment":
            self.codes = self.codes.lerp(mean, 0.1)
        if self.how == "registered late" and not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(3))
        if self.how == "registered late" and self.training:
            self.late += mean
        return x + before[:, None, None]


class Growing(nn.Module):
    """A parametrization of the user's own with a buffer that moves in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale.mul_(1.1)
        return weight * self.scale


class FunctionalNoise(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Growing())
    return layer


def beside(layer: nn.Module) -> nn.Module:
    """Put a layer without parameters behind one that has some."""
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer)


def embedding(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(5)
    return layer


def image() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6)


def vector() -> torch.Tensor:
    return torch.randn(4, 8)


def sequence() -> torch.Tensor:
    return torch.randn(4, 5, 8)


def indices() -> torch.Tensor:
    return torch.randint(10, (4, 5))


class First(nn.Module):
    """The first output of a layer that gives several."""

    def __init__(self, layer: nn.Module, repeats: int = 1) -> None:
        super().__init__()
        self.layer, self.repeats = layer, repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(*[x] * self.repeats)[0]


class Twice(First):
    """A layer that takes two inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x)


Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]
LAYERS: dict[str, Case] = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), image),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), image),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), image),
    "BatchNorm2d without affine": (lambda: beside(nn.BatchNorm2d(3, affine=False)), image),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3))).eval(), image),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), image),
    "GroupNorm": (lambda: nn.GroupNorm(3, 3), image),
    "LayerNorm": (lambda: nn.LayerNorm(8), vector),
    "RMSNorm": (lambda: nn.RMSNorm(8), vector),
    "Dropout": (lambda: beside(nn.Dropout(0.5)), image),
    "RReLU": (lambda: beside(nn.RReLU()), image),
    "PReLU": (lambda: nn.PReLU(3), image),
    "Bilinear": (lambda: Twice(nn.Bilinear(8, 8, 4)), vector),
    "dropout as a function": (lambda: FunctionalNoise(8, 8), vector),
    "LSTM": (lambda: First(nn.LSTM(8, 4, 2, dropout=0.5, batch_first=True)), sequence),
    "GRU": (lambda: First(nn.GRU(8, 4, 2, dropout=0.5, batch_first=True)), sequence),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), 3), sequence),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), sequence),
    "Embedding": (lambda: nn.Embedding(10, 4), indices),
    "Embedding, max_norm": (lambda: embedding(nn.Embedding(10, 4, max_norm=1.0)), indices),
    "Embedding, max_norm and padding": (
        lambda: embedding(nn.Embedding(10, 4, padding_idx=0, max_norm=1.0, norm_type=1.0)),
        indices,
    ),
    "EmbeddingBag, max_norm": (lambda: embedding(nn.EmbeddingBag(10, 4, max_norm=1.0)), indices),
    "spectral_norm of Conv2d": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), image),
    "spectral_norm of ConvTranspose2d": (lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 3)), image),
    "spectral_norm of Linear": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), vector),
    "parametrized spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), image),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), image),
    "parametrized weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), image),
    "parametrized orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), vector),
    "parametrization of one's own": (lambda: parametrized(nn.Linear(8, 8)), vector),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), image),
    "timm's BatchNormAct2d": (lambda: timm.layers.BatchNormAct2d(3), image),
    "timm's DropPath": (lambda: beside(timm.layers.DropPath(0.5)), image),
    "FrozenBatchNorm2d": (lambda: beside(torchvision.ops.FrozenBatchNorm2d(3)), image),
    "observer": (lambda: beside(torch.ao.quantization.MovingAverageMinMaxObserver()), image),
    "fake quantization": (lambda: beside(torch.ao.quantization.FakeQuantize()), image),
    **{
        f"codebook, {how}": (lambda how=how: beside(Codebook(how)), image)
        for how in ("in training", "always", "by data", "by assignment", "not persistent", "registered late")
    },
}
FLOAT32 = {"fake quantization", "observer", "LSTM"}  # not made for bfloat16 on every CPU


def build(name: str) -> nn.Module:
    """Build a network of the layer `name` and a head, as `regraft` would find it: after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        make, draw = LAYERS[name]
        layer, inputs = make(), draw()
        with torch.no_grad():
            width = layer(inputs).flatten(1).shape[1]
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 2))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def train(model: nn.Module, name: str, seed: int, steps: int = 3) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(steps):
            model.train()
            inputs = LAYERS[name][1]()
            with torch.autocast("cpu", torch.bfloat16, enabled=name not in FLOAT32):
                loss = model(inputs).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
