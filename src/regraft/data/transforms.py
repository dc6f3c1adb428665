"""Transforms: the center crop for validation, the augmented views for training, and normalization."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.card import Preprocessing
from regraft.data.device_copies import DeviceCopies
from regraft.data.random_parts import RATIO, SCALE, random_parts
from regraft.train_options import Augmentation

Transform = Callable[[torch.Tensor], torch.Tensor]
MAX_VIEWS = 1_000


@dataclass(frozen=True)
class Views:
    """The views of a photo that a network may see.

    Attributes:
        name: Identifies them: equal names mean equal views.
        crop: Function from pixels (C, H, W) to pixels (C, size, size), both uint8.
        is_mirrored: Whether the mirrored crop is a second view.
        is_random: Whether `crop` draws from torch's random generator.
        views: Number of random views of each photo; None: a new one every time.
        size: Side of a random crop, in pixels.
        operation: Random function from a random crop to pixels of the same shape, which is a part of `crop`.
    """

    name: str
    crop: Transform
    is_mirrored: bool = False
    is_random: bool = False
    views: int | None = None
    size: int = 0
    operation: Transform | None = None

    @property
    def count(self) -> int | None:
        """Number of views of each photo; None: unlimited."""
        return self.views if self.is_random else 1 + self.is_mirrored

    def of(self, index: int, pixels: torch.Tensor, draw: int) -> torch.Tensor:
        """Return the view with the number `draw`, modulo their count; the random state is preserved.

        Args:
            index: Index of the photo, so that the random views of two photos differ.
            pixels: The photo, (C, H, W) of uint8.
            draw: Number of the view.
        """
        view = draw if self.count is None else draw % self.count
        if not self.is_random:
            cropped = self.crop(pixels)
            return cropped.flip(-1) if view else cropped
        return _seeded(self.crop, pixels, self._seed(index, view))

    def of_batch(self, indices: torch.Tensor, photos: Sequence[torch.Tensor], draws: torch.Tensor) -> torch.Tensor:
        """Return one view of each photo as (N, C, size, size), on their device.

        Random parts are those of `random_parts`: distributed as by `of`, but not the same for the same draw.

        Args:
            indices: Indices of the photos, (N,) of int64 on the CPU.
            photos: N photos (C, H, W) of uint8, on one device.
            draws: Numbers of the views, (N,) of int64 on the CPU.
        """
        views = draws if self.count is None else draws % self.count
        if not self.is_random:
            cropped = torch.stack([self.crop(photo) for photo in photos])
            if not self.is_mirrored:
                return cropped
            is_second = views.bool().to(cropped.device)[:, None, None, None]
            return torch.where(is_second, cropped.flip(-1), cropped)
        seeds = self._seed(indices, views)
        parts = random_parts(photos, self.size, seeds)
        if self.operation is None:
            return parts
        return torch.stack([_seeded(self.operation, part, int(seed)) for part, seed in zip(parts, seeds, strict=True)])

    def _seed(self, index: Any, view: Any) -> Any:
        """Return the seed of a random view, for numbers or for tensors of them."""
        return view if self.views is None else index * MAX_VIEWS + view

    def all_of(self, first: int, photos: Sequence[torch.Tensor], copies: DeviceCopies) -> torch.Tensor:
        """Return all views of some photos as (N * count, C, size, size) on the device, photo by photo.

        Args:
            first: Index of the first photo; the others follow.
            photos: N photos (C, H, W) of uint8.
            copies: Copies them to the device; what is random is drawn on the CPU, and done there.
        """
        if self.is_random:
            assert self.views is not None
            on_device = enumerate(copies.each(photos), first)
            return torch.stack(
                [self.of(index, photo, view) for index, photo in on_device for view in range(self.views)]
            )
        cropped = copies.stacked([self.crop(photo) for photo in photos])
        return torch.stack([cropped, cropped.flip(-1)], 1).flatten(0, 1) if self.is_mirrored else cropped


def _seeded(transform: Transform, pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Transform pixels with torch's random generator at a seed; its state is preserved."""
    state = torch.default_generator.get_state()  # the one that transforms draw from
    try:
        torch.default_generator.manual_seed(seed)
        return transform(pixels)
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
    if kind in ("none", "flip"):
        return Views(kind, crop, is_mirrored=kind == "flip")
    from torchvision.transforms import InterpolationMode, v2  # slow to import, and few runs need it

    random_part = v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO, interpolation=InterpolationMode.BILINEAR)
    steps: list[nn.Module] = [random_part, v2.RandomHorizontalFlip()]
    operation = v2.TrivialAugmentWide() if kind == "trivial" else None
    if operation is not None:
        steps.append(operation)
    crop = v2.Compose(steps)
    return Views(f"{kind} {views}", crop, is_random=True, views=views, size=size, operation=operation)


def is_random(kind: Augmentation) -> bool:
    """Return whether a kind of augmentation is random, with unlimited views of a photo."""
    return kind in ("standard", "trivial")


def normalize(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Scale a batch of pixels (N, C, H, W) of uint8 to [0, 1] and normalize it per channel; float32, on its device."""
    mean, std = (_per_channel(values, pixels.device) for values in (preprocessing.mean, preprocessing.std))
    return pixels.float().div_(255).sub_(mean).div_(std)


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return numbers as (C, 1, 1) on a device, to which each copy would wait for what it computes."""
    with torch.inference_mode(mode=False):
        return torch.tensor(values, device=device).view(-1, 1, 1)
