"""Small networks with the names that well-known ones have."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if channels != channels_in:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class SmallResNet(nn.Module):
    """The structure and the names of a ResNet, with two stages of two blocks."""

    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 6, 2), Block(6, 6))
        self.fc = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Named(nn.Module):
    """A network that has nothing but the names and the shapes of its parameters."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            layer: nn.Module = self
            for part in parents:
                if part not in layer._modules:
                    layer.add_module(part, nn.Module())
                layer = layer.get_submodule(part)
            layer.register_parameter(last, nn.Parameter(torch.randn(shape)))


def hugging_face_vit(depth: int = 2, width: int = 8, *, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """List names and shapes of a ViTModel of transformers."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 5, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    linear = {
        "attention.attention.query": (width, width),
        "attention.attention.key": (width, width),
        "attention.attention.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (2 * width, width),
        "output.dense": (width, 2 * width),
    }
    for block in range(depth):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{block}.{name}.weight"] = shape
            shapes[f"encoder.layer.{block}.{name}.bias"] = shape[:1]
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"encoder.layer.{block}.{norm}.{role}": (width,) for role in ("weight", "bias")}
    shapes |= {f"layernorm.{role}": (width,) for role in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def timm_vit(side: int = 16, classes: int = 5, seed: int = 0, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(
            img_size=side, patch_size=4, embed_dim=8, depth=3, num_heads=2, mlp_ratio=2, num_classes=classes, **options
        )


def torchvision_vit(seed: int = 0) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5)


VIT_NAMES = {  # torchvision's names → timm's, within a block
    "ln_1": "norm1",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def timm_name(name: str) -> str:
    """Translate a name of torchvision's vision transformer by hand."""
    whole = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed"}
    if name in whole:
        return whole[name]
    if name.startswith("encoder.layers."):
        _, _, block, rest = name.split(".", 3)
        for before, after in VIT_NAMES.items():
            rest = after + rest.removeprefix(before) if rest.startswith(before) else rest
        return f"blocks.{block.removeprefix('encoder_layer_')}.{rest}"
    for before, after in {"conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head"}.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise AssertionError(name)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network in which all tensors, buffers included, have values of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model
