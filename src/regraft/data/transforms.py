"""Pixels → what a network sees: the crop that is measured on, and random changes to learn from."""

from collections.abc import Callable
from typing import Literal

import torch
from torchvision.transforms import InterpolationMode, v2

from regraft.card import Preprocessing

Augmentation = Literal["none", "flip", "standard", "trivial"]
Transform = Callable[[torch.Tensor], torch.Tensor]


def center_crop(size: int) -> Transform:
    """Return a function from pixels (C, H, W) to their middle (C, size, size)."""

    def crop(pixels: torch.Tensor) -> torch.Tensor:
        _, height, width = pixels.shape
        top, left = round((height - size) / 2), round((width - size) / 2)
        return pixels[:, top : top + size, left : left + size]

    return crop


def augmentation(kind: Augmentation, preprocessing: Preprocessing) -> Transform:
    """Return a random function from pixels (C, H, W) to pixels (C, size, size), both uint8.

    Args:
        kind: `none`: the same crop as for measuring; `flip`: that crop, mirrored half of the time; `standard`: a
            random part of half to all of the area, mirrored half of the time; `trivial`: as standard, then one random
            operation of random strength (TrivialAugment, https://arxiv.org/abs/2103.10158).
        preprocessing: Gives the size.
    """
    size = preprocessing.size
    if kind == "none":
        return center_crop(size)
    if kind == "flip":
        return v2.Compose([center_crop(size), v2.RandomHorizontalFlip()])
    random_part = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BILINEAR)
    steps = [random_part, v2.RandomHorizontalFlip()]
    return v2.Compose(steps if kind == "standard" else [*steps, v2.TrivialAugmentWide()])


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale a batch of pixels (N, C, H, W) of uint8 to [0, 1] and normalize it per channel; float32."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return (pixels.float() / 255 - mean) / std
