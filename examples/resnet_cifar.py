"""ResNets for images of 32 × 32 pixels, for `--model py:examples/resnet_cifar.py:ResNet20` (or `ResNet56`).

The names of the layers are those of the checkpoints of akamaster/pytorch_resnet_cifar10 (BSD licence), which were
trained on CIFAR-10.

Source: He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2, with shortcuts without parameters (option A).
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut that takes every second pixel where the map shrinks."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if channels_in == channels else 2
        self.added = channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added // 2)))


class CifarResNet(nn.Module):
    """A convolution, three stages of 16, 32 and 64 channels, global average pooling, and a linear classifier.

    Args:
        blocks: Blocks in each stage; the network has 6 * blocks + 2 layers.
        num_classes: Number of outputs K.
    """

    preprocessing = {"size": 32, "resize": 32}  # noqa: RUF012

    def __init__(self, blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to scores (N, K)."""
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 16, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H / 4, W / 4)
        return self.linear(x.mean((2, 3)))


def ResNet20() -> nn.Module:
    """Build the network with 20 layers."""
    return CifarResNet(3)


def ResNet56() -> nn.Module:
    """Build the network with 56 layers."""
    return CifarResNet(9)
