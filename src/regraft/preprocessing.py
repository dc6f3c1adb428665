"""Convert the image configuration of timm and transformers to `Preprocessing`.

timm keeps it in `pretrained_cfg`. transformers keeps it in an image processor, in a file of its own beside the weights,
and each architecture may have its own code for resizing. So the processor is run on a test image: of all readings of
its configuration, the one with the nearest output is chosen. Nothing is downloaded.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from regraft.card import Preprocessing

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # values of PIL's Resampling
TEST_SIZE = (300, 221)  # width and height of the test image, in pixels
MAX_DISTANCE = 0.02  # mean difference of normalized values; allows for rounding in two implementations of a filter


def of_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing in timm's `pretrained_cfg`, as its `create_transform` applies it."""
    size = config["input_size"][-1]
    return Preprocessing(
        size=size,
        resize=max(1, int(size / (config.get("crop_pct") or 0.875))),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation") or "bicubic",
        crop_mode=config.get("crop_mode") or "center",
    )


def of_transformers(model: nn.Module) -> tuple[Preprocessing, str] | None:
    """Return the preprocessing of a network of transformers, and where it was read, as text.

    Its image processor is searched for in the folder or cache that the network was loaded from. Without one, the
    default processor of its architecture is used, at the size in the network's own configuration.

    Args:
        model: Any module; the result is None for networks of other libraries, or without image input.
    """
    config = getattr(model, "config", None)
    if "transformers" not in sys.modules or not isinstance(getattr(config, "model_type", None), str):
        return None
    if not isinstance(config, sys.modules["transformers"].PretrainedConfig):
        return None
    name = getattr(model, "name_or_path", "") or getattr(config, "name_or_path", "")
    if name:
        with contextlib.suppress(Exception), _quiet():  # no file, a damaged file, or code that is not trusted
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            return of_processor(processor), f"the image processor of '{name}'"
    size = _side(getattr(config, "image_size", None))
    with contextlib.suppress(Exception), _quiet():
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

        processors: Any = IMAGE_PROCESSOR_MAPPING
        kind: Any = processors[type(config)]
        kind = next(iter(kind.values())) if isinstance(kind, dict) else kind
        kind = next(candidate for candidate in kind if candidate is not None) if isinstance(kind, tuple) else kind
        usual = of_processor(kind())
        if size is not None:
            usual = usual.model_copy(update={"size": size, "resize": round(size * usual.resize / usual.size)})
        return usual, f"{kind.__name__}'s defaults, as no image processor lies beside the weights"
    if size is None:
        return None
    assumed = Preprocessing(size=size, resize=size, crop_mode="squash")
    return assumed, "the configuration's image_size, and ImageNet's mean and deviation, as nothing else is known"


def is_processor(value: object) -> bool:
    """Return whether a value is an image processor of transformers, or a processor that contains one."""
    return hasattr(getattr(value, "image_processor", value), "image_mean")


def of_processor(processor: Any) -> Preprocessing:
    """Return the preprocessing that an image processor of transformers applies.

    Raises:
        ValueError: It is not an image processor, or its output has no fixed size.
    """
    processor = getattr(processor, "image_processor", processor)
    readings = list(_readings(processor))
    if not readings:
        raise ValueError(f"{type(processor).__name__} gives images of no fixed size")
    image = _test_image()
    try:
        with torch.no_grad(), _quiet():
            expected = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"]).squeeze(0)
    except Exception:  # it needs other inputs than images
        return readings[0]
    best = min(readings, key=lambda reading: _distance(reading, image, expected))
    if _distance(best, image, expected) > MAX_DISTANCE:  # normalized twice, as by EfficientNet's, or with an offset
        fits = [fit for reading in readings if (fit := _with_fitted_statistics(reading, image, expected)) is not None]
        fits = [fit for fit in fits if _distance(fit, image, expected) <= MAX_DISTANCE]
        best = min([best, *fits], key=lambda reading: _distance(reading, image, expected))
    return best


def _readings(processor: Any) -> Iterator[Preprocessing]:
    """Yield the possible readings of a processor's configuration, the most likely first."""
    resized, cropped = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    is_cropped = bool(getattr(processor, "do_center_crop", False))
    edge, side, crop = _part(resized, "shortest_edge"), _side(resized), _side(cropped)
    base: dict[str, Any] = {"interpolation": FILTERS.get(getattr(processor, "resample", None) or 2, "bilinear")}
    if getattr(processor, "do_normalize", True) and getattr(processor, "image_mean", None) is not None:
        base |= {"mean": _channels(processor.image_mean), "std": _channels(processor.image_std)}
    else:
        base |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    size = crop if is_cropped and crop else side or edge or crop
    if not size:
        return
    resize = edge or side or size
    if not getattr(processor, "do_resize", True):
        resize = size
    share = getattr(processor, "crop_pct", None) or 0.875
    modes = ("squash", "center") if side else ("center", "squash")
    for mode in modes:
        yield Preprocessing(size=size, resize=resize, crop_mode=mode, **base)
    for mode in modes:
        yield Preprocessing(size=size, resize=int(resize / share), crop_mode=mode, **base)
        yield Preprocessing(size=size, resize=int(256 / 224 * resize), crop_mode=mode, **base)
    if longest := _part(resized, "longest_edge"):
        yield Preprocessing(size=crop or longest, resize=longest, crop_mode="border", **base)


def _distance(reading: Preprocessing, image: Image.Image, expected: torch.Tensor) -> float:
    """Return the mean absolute difference between an image preprocessed by a reading and the expected values.

    Infinite if the shapes differ.
    """
    pixels = _prepared(reading, image)
    if expected.shape != pixels.shape:
        return float("inf")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (reading.mean, reading.std))
    return float(((pixels - mean) / std - expected.float()).abs().mean())


def _with_fitted_statistics(reading: Preprocessing, image: Image.Image, expected: torch.Tensor) -> Preprocessing | None:
    """Return a reading with mean and deviation of each channel fitted to the expected values by least squares."""
    pixels = _prepared(reading, image)
    if expected.shape != pixels.shape:
        return None
    x, y = pixels.flatten(1).double(), expected.flatten(1).double()  # (C, H * W)
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    slope = ((x - x_mean) * (y - y_mean)).sum(1) / (x - x_mean).square().sum(1)
    if bool((slope <= 0).any()):
        return None
    mean = x_mean.squeeze(1) - y_mean.squeeze(1) / slope
    return reading.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple((1 / slope).tolist())})


def _prepared(reading: Preprocessing, image: Image.Image) -> torch.Tensor:
    """Return an image resized and cropped by a reading, (C, size, size), from 0 to 1."""
    from torchvision.transforms.v2 import functional as F

    pixels = F.pil_to_tensor(image)
    height, width = pixels.shape[1:]
    scale = reading.resize / (max if reading.crop_mode == "border" else min)(height, width)
    is_squashed = reading.crop_mode == "squash"
    shape = [reading.resize if is_squashed else max(1, int(side * scale)) for side in (height, width)]
    resized = F.resize(pixels, shape, F.InterpolationMode(reading.interpolation), antialias=True)
    return F.center_crop(resized, [reading.size, reading.size]).float() / 255


def _test_image() -> Image.Image:
    """Return a smooth image in which every region is different, so that any crop can be recognized."""
    width, height = TEST_SIZE
    x, y = torch.meshgrid(torch.linspace(0, 1, width), torch.linspace(0, 1, height), indexing="xy")
    channels = torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)], -1)  # (H, W, 3)
    return Image.fromarray((channels * 255).round().byte().numpy())


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),) * 3


def _part(size: Any, name: str) -> int | None:
    """Return one entry of a size, which is a dict or an object."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return value if isinstance(value, int) else None


def _side(size: Any) -> int | None:
    """Return the side of a square, from a number, a pair, or a size with `height` and `width`."""
    if isinstance(size, int):
        return size
    if isinstance(size, (list, tuple)) and size:
        return int(size[-1])
    return _part(size, "width")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of transformers about its defaults."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
