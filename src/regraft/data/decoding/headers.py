"""What an encoded image says of itself before it is decoded: as far as the engines for plain photos need it."""

import re
import struct
from dataclasses import dataclass
from typing import Literal

from PIL import ExifTags, Image

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # of any kind; the others are tables
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
APP1, START_OF_SCAN = 0xE1, 0xDA
COLORS = {0: 1, 2: 3, 3: 3}  # PNG color types without transparency, and their channels
END_OF_IMAGE = b"\xff\xd9"
EXTRAS = (b"tRNS", b"acTL", b"eXIf")  # PNG chunks: transparency, animation, EXIF
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)[2-8]")  # not upright


@dataclass(frozen=True)
class PhotoHeader:
    """The header of a plain photo.

    Attributes:
        kind: Its format.
        width: In pixels, before it is turned upright.
        height: In pixels, before it is turned upright.
        channels: 1 (gray) or 3 (RGB).
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        is_baseline: Whether it is a JPEG of one scan, of which nothing is missing at its end.
    """

    kind: Literal["jpeg", "png"]
    width: int
    height: int
    channels: int
    orientation: int = 1
    is_baseline: bool = False


def read_header(data: bytes) -> PhotoHeader | None:
    """Return the header of a JPEG or PNG of 8 bits (PNG: or 16), gray or RGB, without transparency or animation.

    None for everything else: other formats, CMYK, 12 bits, an orientation outside of EXIF, a header that is damaged.
    """
    try:
        if data.startswith(JPEG):
            return _jpeg(data)
        if data.startswith(PNG):
            return _png(data)
    except (struct.error, IndexError):  # it ends early
        pass
    return None


def _jpeg(data: bytes) -> PhotoHeader | None:
    """Walk over the segments to the start of the frame. Source: ITU-T T.81, annex B."""
    place, orientation = 2, 1
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in ALONE:
            place += 2
            continue
        if marker == START_OF_SCAN:
            return None
        (length,) = struct.unpack_from(">H", data, place + 2)
        body = place + 4
        if marker in START_OF_FRAME:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, body)
            is_baseline = marker in (0xC0, 0xC1) and data.endswith(END_OF_IMAGE)
            is_plain = bits == 8 and channels in (1, 3) and width and height
            return PhotoHeader("jpeg", width, height, channels, orientation, is_baseline) if is_plain else None
        if marker == APP1:
            segment = data[body : place + 2 + length]
            if XMP_ORIENTATION.search(segment):  # which Pillow follows as well
                return None
            if segment.startswith(b"Exif\0\0"):
                orientation = _orientation(segment)
        place += 2 + length
    return None


def _orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata raise almost anything; Pillow takes them for upright
        return 1
    return orientation if orientation in range(1, 9) else 1


def _png(data: bytes) -> PhotoHeader | None:
    """Read the first chunk, and refuse chunks that ask for more than plain pixels. Source: W3C, PNG, 3rd edition."""
    name, width, height, bits, color = struct.unpack_from(">4sIIBB", data, 12)
    pixels = data.find(b"IDAT", 33)
    extras = data[33 : max(pixels, 33)]
    is_plain = name == b"IHDR" and bits >= 8 and color in COLORS and width and height and pixels > 0
    if not is_plain or XMP_ORIENTATION.search(extras) or any(chunk in extras for chunk in EXTRAS):
        return None
    return PhotoHeader("png", width, height, COLORS[color])
