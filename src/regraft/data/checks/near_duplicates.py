"""Photos that are the same picture: equal files, and copies that were cropped, resized, compressed or mirrored."""

from collections.abc import Sequence
from dataclasses import dataclass

from regraft.data.checks.alignment import align
from regraft.data.checks.candidates import find_candidates
from regraft.data.checks.thumbnails import Thumbnails


@dataclass(frozen=True)
class NearDuplicate:
    """Two photos that show the same picture.

    Attributes:
        first: Index of one photo, the lower one.
        second: Index of the other.
        similarity: Correlation of their gray values, laid over each other; 1 for equal files.
        is_exact: Whether the files are equal, byte by byte.
        is_mirrored: Whether one is the mirror image of the other.
    """

    first: int
    second: int
    similarity: float
    is_exact: bool = False
    is_mirrored: bool = False


def find_near_duplicates(thumbnails: Thumbnails) -> list[NearDuplicate]:
    """Return the pairs of photos that show the same picture; indices are those of the photos that were asked for.

    Of several equal files, each is paired with the first, and only that one is compared with others.
    """
    first_of: dict[bytes, int] = {}
    duplicates, kept = [], []
    for row, (index, digest) in enumerate(zip(thumbnails.indices, thumbnails.digests, strict=True)):
        if digest in first_of:
            duplicates.append(NearDuplicate(first_of[digest], index, 1.0, is_exact=True))
        else:
            first_of[digest] = index
            kept.append(row)
    pixels = thumbnails.pixels[kept]
    pairs = find_candidates(pixels)
    agreement = align(pixels, pairs)
    for pair in agreement.is_same.nonzero().flatten().tolist():
        one, other = (thumbnails.indices[kept[int(rows[pair])]] for rows in (pairs.first, pairs.second))
        similarity = min(1.0, float(agreement.correlation[pair]))
        is_mirrored = bool(pairs.is_mirrored[pair])
        duplicates.append(NearDuplicate(min(one, other), max(one, other), similarity, is_mirrored=is_mirrored))
    return duplicates


def groups_of(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of two or more photos that pairs connect, each in ascending order.

    >>> groups_of(5, [(0, 3), (3, 4)])
    [[0, 3, 4]]
    """
    parents = list(range(count))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    groups: dict[int, list[int]] = {}
    for index in sorted({index for pair in pairs for index in pair}):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
