"""Random parts of many photos at once, on the device on which they are; torchvision takes one photo at a time."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

TRIES = 10  # to draw a part that lies within the photo, as in torchvision
SCALE = (0.5, 1.0)  # of the photo's area
RATIO = (3 / 4, 4 / 3)  # of width to height
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # as signed integers


def random_parts(photos: Sequence[torch.Tensor], size: int, seeds: torch.Tensor) -> torch.Tensor:
    """Return a random part of each photo, mirrored half of the time, resized to a square.

    The parts are distributed as those of `torchvision.transforms.v2.RandomResizedCrop`, and depend on the seeds alone.
    They are read off by bilinear interpolation without antialiasing, which parts that are hardly larger than the square
    do not need.

    Args:
        photos: N photos (C, H, W) of uint8, of any sizes, on one device.
        size: Side of the square, in pixels.
        seeds: N integers (N,) of int64, on the CPU.

    Returns:
        (N, C, size, size) of uint8, on the photos' device.
    """
    heights, widths = (torch.tensor([photo.shape[axis] for photo in photos]).double() for axis in (1, 2))
    numbers = uniform(seeds, 2 * TRIES + 3)
    top, left, height, width = random_boxes(heights, widths, numbers[:, 1:])
    mirror = torch.where(numbers[:, 0] < 0.5, -1.0, 1.0)
    device, channels = photos[0].device, photos[0].shape[0]
    rows, columns = int(heights.max()), int(widths.max())
    canvas = torch.zeros(len(photos), channels, rows, columns, dtype=torch.uint8, device=device)
    for place, photo in zip(canvas, photos, strict=True):
        place[:, : photo.shape[1], : photo.shape[2]].copy_(photo)
    # From the square, whose coordinates go from -1 to 1, to those of the canvas.
    zeros = torch.zeros_like(top)
    across = torch.stack([mirror * width / columns, zeros, (2 * left + width) / columns - 1], 1)
    down = torch.stack([zeros, height / rows, (2 * top + height) / rows - 1], 1)
    # No further out than the centers of a part's outermost pixels, as where it is cut out first.
    first = torch.stack([2 * (left + 0.5) / columns - 1, 2 * (top + 0.5) / rows - 1], 1)
    last = torch.stack([2 * (left + width - 0.5) / columns - 1, 2 * (top + height - 0.5) / rows - 1], 1)
    theta = torch.stack([across, down], 1)  # (N, 2, 3)
    theta, first, last = (_moved(tensor.float(), device) for tensor in (theta, first, last))
    grid = F.affine_grid(theta, [len(photos), channels, size, size], align_corners=False)
    grid = torch.minimum(torch.maximum(grid, first[:, None, None]), last[:, None, None])
    return F.grid_sample(canvas.float(), grid, align_corners=False).round_().byte()


def random_boxes(
    heights: torch.Tensor, widths: torch.Tensor, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return top, left, height and width of a random part of each photo, in whole pixels, each (N,).

    Source: `torchvision.transforms.v2.RandomResizedCrop.make_params`.

    Args:
        heights: Of the photos, (N,) of float64.
        widths: The same.
        numbers: Uniform random numbers (N, 2 * TRIES + 2).
    """
    areas = (heights * widths)[:, None] * (SCALE[0] + (SCALE[1] - SCALE[0]) * numbers[:, :TRIES])
    low, high = map(math.log, RATIO)
    ratios = torch.exp(low + (high - low) * numbers[:, TRIES : 2 * TRIES])
    tried_widths, tried_heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (tried_widths <= widths[:, None]) & (tried_heights <= heights[:, None])
    chosen = fits.int().argmax(1, keepdim=True)  # the first that fits
    width, height = (tried.gather(1, chosen).squeeze(1) for tried in (tried_widths, tried_heights))
    has_none = ~fits.any(1)  # then the middle, as wide and as high as the ratio allows
    width = torch.where(has_none, torch.minimum(widths, (heights * RATIO[1]).round()), width)
    height = torch.where(has_none, torch.minimum(heights, (widths / RATIO[0]).round()), height)
    top = ((heights - height + 1) * numbers[:, -2]).floor()
    left = ((widths - width + 1) * numbers[:, -1]).floor()
    top = torch.where(has_none, ((heights - height) / 2).floor(), top)
    left = torch.where(has_none, ((widths - width) / 2).floor(), left)
    return top, left, height, width


def uniform(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` numbers in [0, 1) for each seed, (N, count) of float64.

    Source: SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.

    Args:
        seeds: (N,) of int64.
        count: Numbers for each.
    """
    states = seeds[:, None] + _GOLDEN * torch.arange(1, count + 1)
    states = (states ^ _shifted(states, 30)) * _MIX1
    states = (states ^ _shifted(states, 27)) * _MIX2
    return _shifted(states ^ _shifted(states, 31), 11).double() / 2**53


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right, with zeros from the left also where the sign is set."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
