"""Decode image files: orient, convert and resize them, and report unreadable files."""

import contextlib
import io
import os
import struct
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from regraft.card import Preprocessing
from regraft.data.sources import ShardMember, Source, read_bytes
from regraft.errors import DataError

MAX_RATIO = 4  # of the sides; longer images lose their ends, which the center crop removes anyway
MAX_PENDING = 64  # photos that are decoded ahead
REDUCTION = 2.0  # a JPEG is decoded at 1/2, 1/4 or 1/8 size if that is still this many times the target size
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Unreadable:
    """A photo that cannot be read, with the reason."""

    path: Source
    reason: str


def decode(source: Source | Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Read an image and resize it for `preprocessing`; the ends of a long image that is center-cropped may be missing.

    A JPEG of more than twice the target size is decoded at a reduced size, which is several times faster and as sharp.
    EXIF orientation is applied, transparent images get a white background, 16-bit gray is scaled to 8 bits, of an
    animation the first frame is used, and CMYK and palettes are converted.

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
        raise DataError(_reason(source, error)) from error
    pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, C)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _file_of(source: Source) -> Path | io.BytesIO:
    if isinstance(source, ShardMember):
        return io.BytesIO(read_bytes(source))
    if source.exists() and not source.is_file():
        raise DataError("not a file")  # opening a named pipe would block forever
    return source


def decode_all(paths: Sequence[Source], preprocessing: Preprocessing) -> Iterator[torch.Tensor | Unreadable]:
    """Decode many files with one thread per core, in order; an unreadable file becomes `Unreadable`.

    At most `MAX_PENDING` photos are decoded ahead.
    """

    def attempt(path: Source) -> torch.Tensor | Unreadable:
        try:
            return decode(path, preprocessing)
        except DataError as error:
            return Unreadable(path, str(error))

    with quiet_decoders(), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            pending: deque[Future[torch.Tensor | Unreadable]] = deque()
            for path in paths:
                pending.append(pool.submit(attempt, path))
                if len(pending) > MAX_PENDING:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # a caller that stops early does not wait for the rest


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence the warnings of decoders about odd files, which are either read or reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


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


def _resize(image: Image.Image, size: tuple[int, int], preprocessing: Preprocessing) -> Image.Image:
    """Resize an image; `size` is its original size, before its decoder reduced it."""
    width, height = resized_size(size, preprocessing)
    box = (0.0, 0.0, float(image.width), float(image.height))
    excess = max(width, height) - MAX_RATIO * preprocessing.resize
    if excess >= MAX_RATIO and preprocessing.crop_mode == "center":
        cut = excess // 4 * 2  # even, so that the center crop rounds to the same place as in the whole image
        share = cut / max(width, height)
        if width > height:
            width, box = width - 2 * cut, (image.width * share, 0.0, image.width * (1 - share), float(image.height))
        else:
            height, box = height - 2 * cut, (0.0, image.height * share, float(image.width), image.height * (1 - share))
    return image.resize((width, height), FILTERS[preprocessing.interpolation], box=box)


def _reason(source: Source | Image.Image, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "the file is empty" if isinstance(source, Path) and source.stat().st_size == 0 else "not an image"
    return f"{type(error).__name__}: {error}"
