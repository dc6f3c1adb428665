"""The engine `native`: torchcodec's decoders, or torchvision's where torchcodec is not installed.

Both are libjpeg-turbo and libpng behind C++ that releases the interpreter's lock, so that threads decode side by side.
They read plain photos; everything else is Pillow's.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image

from regraft.card import Preprocessing
from regraft.data.decoding.headers import PhotoHeader, read_header
from regraft.data.decoding.resizing import FILTERS, has_long_ends, resized

# Of the shorter side to the target size. Pillow decodes larger JPEGs at a reduced size, which is then faster: for 256
# pixels, 0.7 of the time at 3000 × 2250, and 2.7 times the time at 1280 × 960.
MAX_REDUCTION = 6
MAX_PIXELS = 100_000_000  # larger ones are Pillow's, which refuses what is too large for any photo
FIRST_QUARTER_TURN = 5  # EXIF orientations from this one on exchange width and height


@dataclass(frozen=True)
class Decoders:
    """Decoders of a library.

    Attributes:
        name: Its name and version, for the log.
        jpeg: From encoded bytes (N,) of uint8 to upright pixels (C, H, W) of uint8, with the channels of the file.
        png: The same.
    """

    name: str
    jpeg: Callable[[torch.Tensor], torch.Tensor]
    png: Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def library() -> Decoders | None:
    """Return the installed decoders; None if there are none that work."""
    for load in (_torchcodec, _torchvision):
        try:
            loaded = load()
            loaded.png(encoded(_tiny_png()))
        except Exception:  # not installed, too old, built for another torch, or without decoders
            continue
        return loaded
    return None


def _torchcodec() -> Decoders:
    from torchcodec import decoders as module

    decoders: Any = module  # since 0.16
    unchanged = functools.partial(functools.partial, mode="UNCHANGED")
    return Decoders(
        f"torchcodec {version('torchcodec')}", unchanged(decoders.decode_jpeg), unchanged(decoders.decode_png)
    )


def _torchvision() -> Decoders:
    from torchvision import io as decoders

    as_stored = functools.partial(functools.partial, mode=decoders.ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    return Decoders(
        f"torchvision {version('torchvision')}", as_stored(decoders.decode_jpeg), as_stored(decoders.decode_png)
    )


def decode(data: bytes, preprocessing: Preprocessing) -> torch.Tensor | None:
    """Decode and resize a photo; None if it is not one for this engine, or cannot be read.

    Args:
        data: The file's content.
        preprocessing: Gives size, filter and channels.

    Returns:
        Pixels (C, H, W) of uint8.
    """
    decoders, header = library(), read_header(data)
    if decoders is None or header is None or not suits(header, preprocessing):
        return None
    try:
        pixels = (decoders.jpeg if header.kind == "jpeg" else decoders.png)(encoded(data))
    except RuntimeError:  # damaged, of which Pillow reads some and names the rest
        return None
    channels, height, width = pixels.shape
    is_turned = header.orientation >= FIRST_QUARTER_TURN
    expected = (header.width, header.height) if is_turned else (header.height, header.width)
    if pixels.dtype != torch.uint8 or (channels, height, width) != (header.channels, *expected):
        return None
    pixels = resized(pixels.unsqueeze(0), preprocessing).squeeze(0)
    return pixels.expand(preprocessing.channels, -1, -1).contiguous()


def suits(header: PhotoHeader, preprocessing: Preprocessing) -> bool:
    """Return whether a photo is one that is decoded whole and resized by torch."""
    size = (header.width, header.height)
    return (
        preprocessing.interpolation in FILTERS
        and header.channels <= preprocessing.channels
        and (header.kind == "png" or min(size) <= MAX_REDUCTION * preprocessing.resize)
        and header.width * header.height <= MAX_PIXELS
        and not has_long_ends(size, preprocessing)
    )


def encoded(data: bytes) -> torch.Tensor:
    """Return a file's content as the decoders take it: (N,) of uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, as torch warns of memory that is read-only


def _tiny_png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()
