"""The size to which a photo is resized, and resizing of decoded pixels on the CPU or a GPU."""

import torch
from torch.nn import functional as F

from regraft.card import Preprocessing

MAX_RATIO = 4  # of the sides; longer images lose their ends, which the center crop removes anyway
FILTERS = ("bilinear", "bicubic")  # those that torch has with antialiasing


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the size (width, height) to which an image of a given size is resized, in pixels.

    Source: the rounding is that of `torchvision.transforms.Resize` for `center` and of timm's `ResizeKeepRatio` for
    `border`; another order of the same operations is one pixel off for some sizes.
    """
    resize = preprocessing.resize
    if preprocessing.crop_mode == "squash":
        return resize, resize
    if preprocessing.crop_mode == "border":
        ratio = max(size) / resize
        return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
    short, long = min(size), max(size)
    longer = int(resize * long / short)
    return (resize, longer) if size[0] == short else (longer, resize)


def has_long_ends(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Return whether an image of a given size is so long that its ends are left out (see `MAX_RATIO`)."""
    excess = max(resized_size(size, preprocessing)) - MAX_RATIO * preprocessing.resize
    return preprocessing.crop_mode == "center" and excess >= MAX_RATIO


def resized(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Resize photos of one size with antialiasing, on the device on which they are.

    Args:
        pixels: (N, C, H, W) of uint8.
        preprocessing: Gives the size and the filter, one of `FILTERS`.

    Returns:
        (N, C, H', W') of uint8, within one step of what Pillow gives.
    """
    height, width = pixels.shape[-2:]
    size = resized_size((width, height), preprocessing)[::-1]
    if size == (height, width):
        return pixels
    filtered = pixels if pixels.device.type == "cpu" else pixels.float()  # torch has no uint8 filters for GPUs
    filtered = F.interpolate(filtered, size, mode=preprocessing.interpolation, antialias=True)
    if filtered.dtype != torch.uint8:
        filtered = filtered.round_().clamp_(0, 255).byte()
    return filtered.contiguous()
