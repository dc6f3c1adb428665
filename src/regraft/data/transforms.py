"""Pixels → what a network sees: the crop that is measured on, and the versions of a photo to learn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from regraft.card import Preprocessing

Augmentation = Literal["none", "flip", "standard", "trivial"]
Transform = Callable[[torch.Tensor], torch.Tensor]
MAX_VIEWS = 1_000


@dataclass(frozen=True)
class Views:
    """The versions of a photo that a network may see.

    Attributes:
        name: Says what they are; versions of the same name are the same.
        transforms: From pixels (C, H, W) to pixels (C, size, size), both uint8: one function for each version, or a
            single one that draws from torch's random generator.
        is_random: Whether it does.
        views: Number of draws for each photo where it does; None: a new one every time.
    """

    name: str
    transforms: tuple[Transform, ...]
    is_random: bool = False
    views: int | None = None

    @property
    def count(self) -> int | None:
        """Number of versions of each photo; None: endless."""
        return self.views if self.is_random else len(self.transforms)

    def of(self, index: int, pixels: torch.Tensor, draw: int) -> torch.Tensor:
        """Return the version that a number stands for, modulo their count; the random state is as before afterwards.

        Args:
            index: The photo's number, so that random versions of two photos differ.
            pixels: The photo, (C, H, W) of uint8.
            draw: The number.
        """
        view = draw if self.count is None else draw % self.count
        if not self.is_random:
            return self.transforms[view](pixels)
        state = torch.default_generator.get_state()  # the one that transforms draw from
        try:
            torch.default_generator.manual_seed(view if self.views is None else index * MAX_VIEWS + view)
            return self.transforms[0](pixels)
        finally:
            torch.default_generator.set_state(state)


def center_crop(size: int, border: Sequence[int] = (0,)) -> Transform:
    """Return a function from pixels (C, H, W) to their middle (C, size, size).

    Args:
        size: In pixels.
        border: Color of what is added around an image that is smaller: one number, or one per channel.
    """

    def crop(pixels: torch.Tensor) -> torch.Tensor:
        channels, height, width = pixels.shape
        if height < size or width < size:
            top, left = max(0, size - height) // 2, max(0, size - width) // 2
            color = torch.tensor(border, dtype=pixels.dtype).view(-1, 1, 1)
            padded = color.expand(channels, max(size, height), max(size, width)).clone()
            padded[:, top : top + height, left : left + width] = pixels
            pixels, (height, width) = padded, padded.shape[1:]
        top, left = round((height - size) / 2), round((width - size) / 2)
        return pixels[:, top : top + size, left : left + size]

    return crop


def augmentation(kind: Augmentation, preprocessing: Preprocessing, views: int | None = None) -> Views:
    """Return the versions of a photo to learn from.

    Args:
        kind: `none`: the same crop as for measuring; `flip`: that crop and its mirror image; `standard`: a random part
            of half to all of the area, mirrored half of the time; `trivial`: as standard, then one random operation of
            random strength (TrivialAugment, https://arxiv.org/abs/2103.10158).
        preprocessing: Gives the size.
        views: Number of random versions of each photo; None: a new one every time.
    """
    size = preprocessing.size
    crop = center_crop(size, preprocessing.border)
    if kind == "none":
        return Views(kind, (crop,))
    if kind == "flip":
        return Views(kind, (crop, lambda pixels: crop(pixels).flip(-1)))
    from torchvision.transforms import InterpolationMode, v2  # costs seconds, and few runs need it

    random_part = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BILINEAR)
    steps: list[nn.Module] = [random_part, v2.RandomHorizontalFlip()]
    if kind == "trivial":
        steps.append(v2.TrivialAugmentWide())
    return Views(f"{kind} {views}", (v2.Compose(steps),), is_random=True, views=views)


def is_random(kind: Augmentation) -> bool:
    """Return whether a kind of augmentation has more versions of a photo than can be listed."""
    return kind in ("standard", "trivial")


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale a batch of pixels (N, C, H, W) of uint8 to [0, 1] and normalize it per channel; float32."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)
