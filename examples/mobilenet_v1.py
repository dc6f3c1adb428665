"""MobileNetV1 with a quarter of the width: a class of one's own, for `--model py:examples/mobilenet_v1.py:MobileNetV1`.

The names of its layers are those of the checkpoint `mobilenetV1X0.25_pretrain.tar` of bubbliiiing/retinaface-pytorch
(MIT licence), which was trained on ImageNet.

Source: Howard et al. 2017, https://arxiv.org/abs/1704.04861, table 1; LeakyReLU as in that checkpoint's training.
"""

import torch
from torch import nn


class MobileNetV1(nn.Module):
    """A stem, 13 depthwise separable convolutions in three stages, global average pooling, and a linear classifier.

    Args:
        num_classes: Number of outputs K.
        width: Channels after the stem; all others are multiples of it (8: a quarter of the paper's).
    """

    def __init__(self, num_classes: int = 1000, width: int = 8) -> None:
        super().__init__()
        w = width
        self.stage1 = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.LeakyReLU(0.1)),
            separable(w, 2 * w, stride=1),
            separable(2 * w, 4 * w, stride=2),
            separable(4 * w, 4 * w, stride=1),
            separable(4 * w, 8 * w, stride=2),
            separable(8 * w, 8 * w, stride=1),
        )
        self.stage2 = nn.Sequential(
            separable(8 * w, 16 * w, stride=2), *(separable(16 * w, 16 * w, stride=1) for _ in range(5))
        )
        self.stage3 = nn.Sequential(separable(16 * w, 32 * w, stride=2), separable(32 * w, 32 * w, stride=1))
        self.avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32 * w, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, H, W) to scores (N, K)."""
        x = self.stage3(self.stage2(self.stage1(x)))  # (N, 32 * width, H / 32, W / 32)
        x = self.avg(x).flatten(1)  # (N, 32 * width)
        return self.fc(x)


def separable(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Build a depthwise 3×3 convolution and a pointwise one, each with batch norm and LeakyReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False),
        nn.BatchNorm2d(channels_in),
        nn.LeakyReLU(0.1),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.LeakyReLU(0.1),
    )
