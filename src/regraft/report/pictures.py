"""Thumbnails of photos, embedded in a page."""

import base64
import io
from pathlib import Path

from PIL import Image

from regraft.card import Preprocessing
from regraft.data.decoding.files import decode, quiet_decoders
from regraft.errors import DataError

MAX_SIDE = 160
JPEG_QUALITY = 80


def thumbnail(path: Path) -> str | None:
    """Return a photo as a data URI: upright, at most 160 × 160 pixels, and without the metadata of the file.

    Returns:
        The URI of a JPEG, or None if the file is missing or unreadable.
    """
    try:
        with quiet_decoders():
            pixels = decode(path, Preprocessing(size=MAX_SIDE, resize=MAX_SIDE))  # (3, H, W) of uint8
    except (DataError, OSError):
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
