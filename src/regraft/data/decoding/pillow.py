"""The engine `pillow`, the reference: it orients, converts and resizes every kind of image, or says why it cannot."""

import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from regraft.card import Preprocessing
from regraft.data.decoding.resizing import MAX_RATIO, has_long_ends, resized_size
from regraft.data.sources import ShardMember, Source, read_bytes
from regraft.errors import DataError

REDUCTION = 2.0  # a JPEG is decoded at 1/2, 1/4 or 1/8 size if that is still this many times the target size
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(source: Source | Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Read an image of any kind and resize it, as `files.decode` describes.

    A JPEG of more than twice the target size is decoded at a reduced size, which is several times faster and as sharp.

    Returns:
        Pixels (C, H, W) as uint8.

    Raises:
        DataError: The file cannot be read as an image; the message is the reason only.
    """
    try:
        if isinstance(source, Image.Image):
            image, size = _to_gray_or_rgb(source, preprocessing.channels), None
        else:
            with Image.open(_file_of(source)) as opened:
                side = round(REDUCTION * preprocessing.resize)
                size = opened.size
                opened.draft(opened.mode, (side, side))  # only JPEG has this: other formats ignore it
                is_reduced = opened.size != size
                size = _upright_size(opened, size) if is_reduced else None
                image = _to_gray_or_rgb(opened, preprocessing.channels)
        image = _resize(image, size or image.size, preprocessing)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # image decoders raise almost any exception
        raise DataError(reason_of(source, error)) from error
    return _as_tensor(image)


def as_stored(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Return an opened image, upright and converted but not resized, as pixels (C, H, W) of uint8.

    Raises:
        DataError: It cannot be read; the message is the reason only.
    """
    try:
        return _as_tensor(_to_gray_or_rgb(image, preprocessing.channels))
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(reason_of(image, error)) from error


def _as_tensor(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _file_of(source: Source) -> Path | io.BytesIO:
    if isinstance(source, ShardMember):
        return io.BytesIO(read_bytes(source))
    if source.exists() and not source.is_file():
        raise DataError("not a file")  # opening a named pipe would block forever
    return source


def _to_gray_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8-bit gray or RGB, with the EXIF orientation applied."""
    image.load()
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error):  # damaged metadata
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values: Any = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        values = (values - low) / max(high - low, 1e-12) * 255
    elif image.mode != "I" or values.max() > 255:  # "I" has 32 bits, of which files use 8 or 16
        values = values / 257  # 65535 → 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _upright_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return width and height after `_to_gray_or_rgb` has applied the orientation."""
    orientation = None
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, struct.error):  # damaged metadata
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return (size[1], size[0]) if orientation in QUARTER_TURNS else size


def _resize(image: Image.Image, size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resize an image; `size` is its original size, before its decoder reduced it."""
    width, height = resized_size(size, preprocessing)
    box = (0.0, 0.0, float(image.width), float(image.height))
    if has_long_ends(size, preprocessing):
        excess = max(width, height) - MAX_RATIO * preprocessing.resize
        cut = excess // 4 * 2  # even, so that the center crop rounds to the same place as in the whole image
        share = cut / max(width, height)
        if width > height:
            width, box = width - 2 * cut, (image.width * share, 0.0, image.width * (1 - share), float(image.height))
        else:
            height, box = height - 2 * cut, (0.0, image.height * share, float(image.width), image.height * (1 - share))
    return image.resize((width, height), FILTERS[preprocessing.interpolation], box=box)


def reason_of(source: Source | Image.Image, error: Exception) -> str:
    """Return why an image cannot be read, as text, from the error that reading it raised."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "the file is empty" if isinstance(source, Path) and source.stat().st_size == 0 else "not an image"
    return f"{type(error).__name__}: {error}"
