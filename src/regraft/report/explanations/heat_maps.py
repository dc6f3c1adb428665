"""Heat maps of example photos: the photo as the network sees it, and over it where it looked."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from regraft.card import Preprocessing
from regraft.data.decoding.files import decode, quiet_decoders
from regraft.data.sources import Source
from regraft.data.transforms import center_crop, normalize
from regraft.errors import DataError
from regraft.report.explanations.saliency import grad_cam, occlusion
from regraft.report.pictures import MAX_SIDE, jpeg_uri
from regraft.training.checks.weight_types import compute_for
from regraft.zoo import preprocessing_of

BATCH_SIZE = 4
MAX_SECONDS = 20.0  # of computing, after which the remaining photos have no heat map
GRAY_SHARE = 0.5  # brightness of the photo where the network did not look
REGIONS = (("upper left", "top", "upper right"), ("left", "middle", "right"), ("lower left", "bottom", "lower right"))


@dataclass(frozen=True)
class HeatMap:
    """Where in a photo lies what spoke for an answer.

    Attributes:
        picture: Data URI of the overlay: what the network saw, gray and dark where it found nothing.
        text: The same in words.
    """

    picture: str
    text: str


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of some photos.

    Attributes:
        maps: One for each photo; None where it cannot be read, nothing spoke for the answer, or time was up.
        method: `Grad-CAM`, `occlusion`, or empty without any.
        grid: Height and width of the maps.
        problem: Why there are none; None if there are.
    """

    maps: tuple[HeatMap | None, ...]
    method: str = ""
    grid: tuple[int, int] = (0, 0)
    problem: str | None = None


def draw_heat_maps(model: nn.Module, photos: Sequence[Source], classes: Sequence[int]) -> HeatMaps:
    """Return what in each photo spoke for a class, by Grad-CAM, or by occlusion where a network has no map of features.

    A network that fails gives no heat maps, and the reason.

    Args:
        model: A network that returns scores of classes, on its device; nothing of it is changed.
        photos: The photos.
        classes: The class of each.
    """
    nothing: tuple[HeatMap | None, ...] = (None,) * len(photos)
    try:
        return _draw(model, photos, classes)
    except Exception as error:  # a network of the user's own; the report is worth more than this part of it
        reason = str(error).partition("\n")[0] or type(error).__name__
        return HeatMaps(nothing, problem=reason)


def _draw(model: nn.Module, photos: Sequence[Source], classes: Sequence[int]) -> HeatMaps:
    began = time.perf_counter()
    preprocessing = preprocessing_of(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    dtype = compute_for(model, device).input_dtype or torch.float32
    seen = {index: pixels for index, path in enumerate(photos) if (pixels := _seen(path, preprocessing)) is not None}
    maps: dict[int, HeatMap | None] = {}
    method, grid, places = "", (0, 0), list(seen)
    for start in range(0, len(places), BATCH_SIZE):
        if time.perf_counter() - began > MAX_SECONDS:
            break
        batch = places[start : start + BATCH_SIZE]
        images = normalize(torch.stack([seen[index] for index in batch]), preprocessing).to(device, dtype)
        targets = torch.tensor([classes[index] for index in batch])
        heat = grad_cam(model, images, targets) if method != "occlusion" else None  # (N, h, w)
        method = "Grad-CAM" if heat is not None else "occlusion"
        heat = occlusion(model, images, targets) if heat is None else heat
        grid = (heat.shape[1], heat.shape[2])
        for index, values in zip(batch, heat.cpu(), strict=True):
            maps[index] = HeatMap(_overlay(seen[index], values), in_words(values)) if values.any() else None
    return HeatMaps(tuple(maps.get(index) for index in range(len(photos))), method, grid)


def _seen(path: Source, preprocessing: Preprocessing) -> torch.Tensor | None:
    """Return the part of a photo that the network sees, (C, size, size) of uint8; None for one that is unreadable."""
    try:
        with quiet_decoders():
            return center_crop(preprocessing.size, preprocessing.border)(decode(path, preprocessing)).cpu()
    except (DataError, OSError):
        return None


def _overlay(pixels: torch.Tensor, heat: torch.Tensor) -> str:
    """Return the photo in color where the network looked, and darker and gray elsewhere, as a data URI.

    Color and brightness both tell, so that it can be read without telling colors apart, and in print.

    Args:
        pixels: (C, size, size) of uint8.
        heat: (h, w), from 0 to 1.
    """
    rgb = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels[:3]
    photo = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy()).resize((MAX_SIDE, MAX_SIDE))
    mask = Image.fromarray((heat * 255).byte().numpy()).resize(photo.size, Image.Resampling.BICUBIC)
    weight = np.asarray(mask, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    color = np.asarray(photo, dtype=np.float32)
    gray = np.asarray(photo.convert("L"), dtype=np.float32)[..., None] * GRAY_SHARE
    warm = color * 0.7 + np.array([255, 170, 0], dtype=np.float32) * 0.3
    mixed = weight * warm + (1 - weight) * gray
    return jpeg_uri(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)))


def in_words(heat: torch.Tensor) -> str:
    """Describe a map (h, w): where its middle lies, and how much of the photo holds half of it.

    >>> heat = torch.zeros(4, 4); heat[0, :2] = 1
    >>> in_words(heat)
    'mostly at the upper left; half of it on 6 % of the photo'
    """
    share = heat.double() / heat.double().sum()
    height, width = share.shape
    row = float((share.sum(1) * (torch.arange(height) + 0.5)).sum()) / height
    column = float((share.sum(0) * (torch.arange(width) + 0.5)).sum()) / width
    where = REGIONS[min(int(row * 3), 2)][min(int(column * 3), 2)]
    largest = share.flatten().sort(descending=True).values.cumsum(0)
    area = (int((largest < 0.5 - 1e-9).sum()) + 1) / share.numel()
    place = "in the middle" if where == "middle" else f"at the {where}"
    return f"mostly {place}; half of it on {area:.0%} of the photo".replace("%", " %")
