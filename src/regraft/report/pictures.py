"""Pictures of a page: thumbnails of photos, embedded, and their captions."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from regraft.card import Preprocessing
from regraft.data.decoding.files import decode, quiet_decoders
from regraft.data.sources import Source
from regraft.errors import DataError

MAX_SIDE = 160
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """An entry of the macro `picture_grid`: one picture, or several side by side, with a caption.

    Attributes:
        images: Data URIs, as `thumbnail` returns them; None for a photo that cannot be shown.
        alt: What it shows in words, for those who cannot see it.
        lines: Lines of the caption.
        name: Name of the file or files, below them.
    """

    images: Sequence[str | None]
    alt: str
    lines: Sequence[str] = ()
    name: str = ""


def thumbnail(path: Source) -> str | None:
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
    return jpeg_uri(image)


def jpeg_uri(image: Image.Image) -> str:
    """Return an image as the data URI of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
