"""Read image files with the engine that the preprocessing names; what one engine leaves, the next one reads."""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from regraft.card import Preprocessing
from regraft.data.decoding import native, nvjpeg, pillow
from regraft.data.decoding.headers import PhotoHeader
from regraft.data.decoding.resizing import resized
from regraft.data.sources import Source, read_bytes
from regraft.errors import DataError

MAX_PENDING = 64  # photos that are decoded ahead
CHANNELS = {"L": 1, "RGB": 3}  # of Pillow's modes that the other engines decode
BATCH = 128  # photos of one batch of nvJPEG
MAX_BATCHES = 3  # that are read and decoded ahead


@dataclass(frozen=True)
class Unreadable:
    """A photo that cannot be read, with the reason."""

    path: Source
    reason: str


def decode(source: Source | Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Read an image and resize it for `preprocessing`; the ends of a long image that is center-cropped may be missing.

    EXIF orientation is applied, transparent images get a white background, 16-bit gray is scaled to 8 bits, of an
    animation the first frame is used, and CMYK and palettes are converted. The engines agree but for rounding; large
    JPEGs (see `native.MAX_REDUCTION`, and `pillow.decode`) may be decoded at a reduced size.

    Returns:
        Pixels (C, H, W) as uint8, on the CPU, or on the GPU by nvJPEG.

    Raises:
        DataError: The file cannot be read as an image; the message is the reason only.
    """
    if isinstance(source, Image.Image):
        return _decode_opened(source, preprocessing)
    if preprocessing.decoder == "pillow":
        return pillow.decode(source, preprocessing)
    content = _content(source)
    if content is not None and preprocessing.decoder == "nvjpeg" and get_worker_info() is None:
        (pixels,) = nvjpeg.decode([content], preprocessing, nvjpeg.device())
        if pixels is not None:
            return pixels
    return _decode_content(source, content, preprocessing)


def _decode_opened(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """Decode an image that Pillow has opened, and resize it as if its file had been given."""
    kind = "jpeg" if image.format == "JPEG" else "png"
    header = PhotoHeader(kind, *image.size, channels=CHANNELS.get(image.mode, 4))
    is_plain = image.mode in CHANNELS and "transparency" not in image.info
    if preprocessing.decoder == "pillow" or not is_plain or not native.suits(header, preprocessing):
        return pillow.decode(image, preprocessing)
    return resized(pillow.as_stored(image, preprocessing).unsqueeze(0), preprocessing).squeeze(0)


def _content(source: Source) -> bytes | None:
    """Return the content of a file or of a place in a shard; None where Pillow has to say why there is none."""
    with contextlib.suppress(DataError, ValueError):
        return read_bytes(source)
    return None


def _decode_content(source: Source, content: bytes | None, preprocessing: Preprocessing) -> torch.Tensor:
    pixels = native.decode(content, preprocessing) if content is not None else None
    return pixels if pixels is not None else pillow.decode(source, preprocessing)


def decode_all(
    paths: Sequence[Source], preprocessing: Preprocessing, *, is_ahead: bool = False
) -> Iterator[torch.Tensor | Unreadable]:
    """Decode many files in order, with one thread per core or in batches on the GPU; see `decode`.

    An unreadable file becomes `Unreadable`. Only a few photos are decoded before the caller asks for them.

    Args:
        paths: The files.
        preprocessing: See `decode`.
        is_ahead: Whether photos are decoded while the caller works with earlier ones. Where it computes on the same
            cores, threads of both in each other's way take twice the time of one after the other.
    """
    with quiet_decoders(), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            if preprocessing.decoder == "nvjpeg":
                yield from _decode_on_gpu(paths, preprocessing, pool)
                return
            pending: deque[Future[torch.Tensor | Unreadable]] = deque()
            for path in paths:
                pending.append(pool.submit(_attempt, path, preprocessing))
                if len(pending) >= MAX_PENDING:
                    for _ in range(1 if is_ahead else len(wait(pending).done)):
                        yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # a caller that stops early does not wait for the rest


def _attempt(path: Source, preprocessing: Preprocessing) -> torch.Tensor | Unreadable:
    try:
        return decode(path, preprocessing)
    except DataError as error:
        return Unreadable(path, str(error))


def _decode_on_gpu(
    paths: Sequence[Source], preprocessing: Preprocessing, pool: ThreadPoolExecutor
) -> Iterator[torch.Tensor | Unreadable]:
    """Read files in the threads of the pool, and decode them in batches in a thread of its own, ahead of the caller."""
    gpu = nvjpeg.device()
    stream = torch.cuda.Stream(gpu) if gpu.type == "cuda" else None
    used_on = torch.cuda.current_stream(gpu) if stream is not None else None

    def finish(path: Source, content: bytes | None) -> torch.Tensor | Unreadable:
        try:
            return _decode_content(path, content, preprocessing)
        except DataError as error:
            return Unreadable(path, str(error))

    def decode_batch(
        part: Sequence[Source], reading: list[Future[bytes | None]]
    ) -> list[torch.Tensor | Future[torch.Tensor | Unreadable]]:
        contents = [read.result() for read in reading]
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            decoded = nvjpeg.decode([content or b"" for content in contents], preprocessing, gpu)
        if stream is not None and used_on is not None:
            stream.synchronize()  # this thread waits, the caller computes on
            for pixels in decoded:
                if pixels is not None:
                    pixels.record_stream(used_on)
        return [
            pixels if pixels is not None else pool.submit(finish, path, content)
            for path, content, pixels in zip(part, contents, decoded, strict=True)
        ]

    with ThreadPoolExecutor(1) as decoding:
        pending: deque[Future[list[torch.Tensor | Future[torch.Tensor | Unreadable]]]] = deque()
        for first in range(0, len(paths), BATCH):
            part = paths[first : first + BATCH]
            pending.append(decoding.submit(decode_batch, part, [pool.submit(_content, path) for path in part]))
            if len(pending) > MAX_BATCHES:
                yield from map(_result, pending.popleft().result())
        while pending:
            yield from map(_result, pending.popleft().result())


def _result(photo: "torch.Tensor | Future[torch.Tensor | Unreadable]") -> torch.Tensor | Unreadable:
    return photo.result() if isinstance(photo, Future) else photo


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silence the warnings of decoders about odd files, which are either read or reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)  # torchvision's
        yield
