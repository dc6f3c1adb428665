"""Transforms: the center crop for validation, the augmented views for training, and normalization."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from regraft.card import Preprocessing
from regraft.train_options import Augmentation

Transform = Callable[[torch.Tensor], torch.Tensor]
MAX_VIEWS = 1_000


@dataclass(frozen=True)
class Views:
    """The views of a photo that a network may see.

    Attributes:
        name: Identifies them: equal names mean equal views.
        transforms: Functions from pixels (C, H, W) to pixels (C, size, size), both uint8: one for each view, or a
            single one that draws from torch's random generator.
        is_random: Whether it is a single random function.
        views: Number of random views of each photo; None: a new one every time.
    """

    name: str
    transforms: tuple[Transform, ...]
    is_random: bool = False
    views: int | None = None

    @property
    def count(self) -> int | None:
        """Number of views of each photo; None: unlimited."""
        return self.views if self.is_random else len(self.transforms)

    def of(self, index: int, pixels: torch.Tensor, draw: int) -> torch.Tensor:
        """Return the view with the number `draw`, modulo their count; the random state is preserved.

        Args:
            index: Index of the photo, so that the random views of two photos differ.
            pixels: The photo, (C, H, W) of uint8.
            draw: Number of the view.
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
    """Return a function that crops the center (C, size, size) of pixels (C, H, W).

    Args:
        size: In pixels.
        border: Padding color of smaller images: one number, or one per channel.
    """
    # No closure: the processes of a loader get it pickled, wherever they are not forked.
    return functools.partial(_crop, size=size, border=border)


def _crop(pixels: torch.Tensor, *, size: int, border: Sequence[int]) -> torch.Tensor:
    channels, height, width = pixels.shape
    if height < size or width < size:
        top, left = max(0, size - height) // 2, max(0, size - width) // 2
        color = torch.tensor(border, dtype=pixels.dtype).view(-1, 1, 1)
        padded = color.expand(channels, max(size, height), max(size, width)).clone()
        padded[:, top : top + height, left : left + width] = pixels
        pixels, (height, width) = padded, padded.shape[1:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[:, top : top + size, left : left + size]


def _flipped_crop(pixels: torch.Tensor, *, size: int, border: Sequence[int]) -> torch.Tensor:
    return _crop(pixels, size=size, border=border).flip(-1)


def augmentation(kind: Augmentation, preprocessing: Preprocessing, views: int | None = None) -> Views:
    """Return the views of a training photo.

    Args:
        kind: `none`: the center crop, as for validation; `flip`: that crop and its horizontal flip; `standard`: a
            random resized crop of half to all of the area, flipped with probability 1/2; `trivial`: as standard, then
            one random operation of random strength (TrivialAugment, https://arxiv.org/abs/2103.10158).
        preprocessing: Gives the size.
        views: Number of random views of each photo; None: a new one every time.
    """
    size, border = preprocessing.size, preprocessing.border
    crop = center_crop(size, border)
    if kind == "none":
        return Views(kind, (crop,))
    if kind == "flip":
        return Views(kind, (crop, functools.partial(_flipped_crop, size=size, border=border)))
    from torchvision.transforms import InterpolationMode, v2  # slow to import, and few runs need it

    random_part = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BILINEAR)
    steps: list[nn.Module] = [random_part, v2.RandomHorizontalFlip()]
    if kind == "trivial":
        steps.append(v2.TrivialAugmentWide())
    return Views(f"{kind} {views}", (v2.Compose(steps),), is_random=True, views=views)


def is_random(kind: Augmentation) -> bool:
    """Return whether a kind of augmentation is random, with unlimited views of a photo."""
    return kind in ("standard", "trivial")


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale a batch of pixels (N, C, H, W) of uint8 to [0, 1] and normalize it per channel; float32."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)
