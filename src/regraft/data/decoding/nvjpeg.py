"""The engine `nvjpeg`: batches of JPEGs decoded on a GPU, and resized there.

It is given whole, upright JPEGs of 8 bits; everything else, and what nvJPEG refuses, is left to the other engines.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from regraft.card import Preprocessing
from regraft.data.decoding.headers import PhotoHeader, read_header
from regraft.data.decoding.native import encoded
from regraft.data.decoding.resizing import FILTERS, has_long_ends, resized

MAX_PIXELS = (
    64_000_000  # in one call, of 3 bytes each before they are resized: 320 photos of 500 × 400, or 5 of a phone
)
BatchDecoder = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def device() -> torch.device:
    """Return the GPU of the calling thread."""
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def decoder(on: torch.device) -> BatchDecoder | None:
    """Return the function that decodes a batch on a device; None if there is none that works.

    torchcodec is built for one version of CUDA, torchvision for another or for none, so both are tried on a photo.
    """
    for load in (_torchcodec, _torchvision):
        try:
            decode = load(on)
            (pixels,) = decode([encoded(_tiny_jpeg())])
        except Exception:  # not installed, without CUDA, or built for another one
            continue
        if pixels.device.type == on.type:
            return decode
    return None


def _torchcodec(on: torch.device) -> BatchDecoder:
    from torchcodec import decoders as module

    decoders: Any = module  # since 0.16
    return lambda batch: decoders.decode_jpeg(batch, mode="UNCHANGED", device=on)


def _torchvision(on: torch.device) -> BatchDecoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda batch: decode_jpeg(batch, mode=ImageReadMode.UNCHANGED, device=on)  # pyright: ignore


def decode(contents: Sequence[bytes], preprocessing: Preprocessing, on: torch.device) -> list[torch.Tensor | None]:
    """Decode and resize photos on a GPU; None for each that is left to the other engines.

    Args:
        contents: The contents of the files.
        preprocessing: Gives size, filter and channels.
        on: The GPU.

    Returns:
        Pixels (C, H, W) of uint8, on the GPU.
    """
    pixels: list[torch.Tensor | None] = [None] * len(contents)
    part: list[int] = []
    room = MAX_PIXELS
    for number, content in enumerate(contents):
        header = read_header(content)
        if header is None or not _suits(header, preprocessing):
            continue
        if part and header.width * header.height > room:
            _decode_part(contents, part, pixels, preprocessing, on)
            part, room = [], MAX_PIXELS
        part.append(number)
        room -= header.width * header.height
    _decode_part(contents, part, pixels, preprocessing, on)
    return pixels


def _suits(header: PhotoHeader, preprocessing: Preprocessing) -> bool:
    size = (header.width, header.height)
    return (
        header.is_baseline
        and header.orientation == 1
        and preprocessing.interpolation in FILTERS
        and header.channels <= preprocessing.channels
        and header.width * header.height <= MAX_PIXELS
        and not has_long_ends(size, preprocessing)
    )


def _decode_part(
    contents: Sequence[bytes],
    part: Sequence[int],
    pixels: list[torch.Tensor | None],
    preprocessing: Preprocessing,
    on: torch.device,
) -> None:
    """Fill in the pixels of some photos; those of one size are resized together, if there is memory for it."""
    by_shape: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
    decoded = _decode_each([encoded(contents[number]) for number in part], on)
    for number, whole in zip(part, decoded, strict=True):
        if whole is not None:
            by_shape.setdefault(whole.shape, []).append((number, whole))
    for photos in by_shape.values():
        with contextlib.suppress(torch.OutOfMemoryError):
            batch = resized(torch.stack([whole for _, whole in photos]), preprocessing)
            batch = batch.expand(-1, preprocessing.channels, -1, -1)
            for (number, _), photo in zip(photos, batch, strict=True):
                pixels[number] = photo.contiguous()


def _decode_each(batch: list[torch.Tensor], on: torch.device) -> list[torch.Tensor | None]:
    """Decode a batch; if one of it is refused, which fails the whole call, halve it until that one is alone."""
    decode_batch = decoder(on)
    if not batch or decode_batch is None:
        return [None] * len(batch)
    try:
        return list(decode_batch(batch))
    except RuntimeError:  # also when memory is short
        if len(batch) == 1:
            return [None]
    half = len(batch) // 2
    return [*_decode_each(batch[:half], on), *_decode_each(batch[half:], on)]


def _tiny_jpeg() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "jpeg")
    return file.getvalue()
