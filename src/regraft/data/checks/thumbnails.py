"""Small gray thumbnails of photos, with what their files say: the one pass over the photos that the checks need."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image

from regraft.card import Preprocessing
from regraft.data.decoding import pillow
from regraft.data.decoding.files import Unreadable, quiet_decoders
from regraft.data.sources import Source, read_bytes
from regraft.errors import DataError
from regraft.progress import SILENT, Progress

SIDE = 64  # pixels; 4 KiB a photo, 400 MiB for 100,000
MAX_PENDING = 256  # photos that are read ahead
GRAY = Preprocessing(size=SIDE, resize=SIDE, mean=(0.0,), std=(1.0,), crop_mode="squash")


@dataclass(frozen=True)
class Thumbnails:
    """The readable ones of some photos.

    Attributes:
        indices: The place of each among the photos that were asked for, N numbers in order.
        pixels: (N, SIDE, SIDE) of uint8: gray, upright, squashed to a square.
        sizes: Width and height of each in pixels, as stored.
        digests: Digest of the content of each file.
        unreadable: The other files, with the reason.
    """

    indices: tuple[int, ...]
    pixels: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    digests: tuple[bytes, ...]
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)


def read_thumbnails(sources: Sequence[Source], *, progress: Progress = SILENT) -> Thumbnails:
    """Read photos with one thread per core; a JPEG is decoded at a reduced size, which takes a fraction of the time."""
    pixels = torch.empty(len(sources), SIDE, SIDE, dtype=torch.uint8)
    indices, sizes, digests, unreadable = [], [], [], []
    read = progress.track(_read_all(sources), "looking at photos", len(sources))
    for index, photo in enumerate(read):
        if isinstance(photo, Unreadable):
            unreadable.append(photo)
            continue
        gray, size, digest = photo
        pixels[len(indices)] = gray
        indices.append(index)
        sizes.append(size)
        digests.append(digest)
    return Thumbnails(tuple(indices), pixels[: len(indices)], tuple(sizes), tuple(digests), tuple(unreadable))


Photo = tuple[torch.Tensor, tuple[int, int], bytes]


def _read_all(sources: Sequence[Source]) -> Iterator[Photo | Unreadable]:
    with quiet_decoders(), ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[Future[Photo | Unreadable]] = deque()
        try:
            for source in sources:
                pending.append(pool.submit(_read, source))
                if len(pending) >= MAX_PENDING:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: Source) -> Photo | Unreadable:
    try:
        content = read_bytes(source)
    except (DataError, ValueError) as error:
        return Unreadable(source, str(error))
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            image.draft("L", (2 * SIDE, 2 * SIDE))  # only JPEG has this: other formats ignore it
            gray = pillow.decode(image, GRAY)[0]
    except DataError as error:
        return Unreadable(source, str(error))
    except MemoryError:
        raise
    except Exception as error:  # image decoders raise almost any exception
        return Unreadable(source, pillow.reason_of(source, error))
    return gray, size, hashlib.blake2b(content, digest_size=16).digest()
