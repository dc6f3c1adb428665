"""Pairs of photos that may be near-duplicates: one, whole or mirrored, resembles a part of the other.

Each photo is described by its gray values on 8 × 8 cells, without brightness and contrast, and so are `PARTS` of it:
30 squares in it, from the whole to 70 % of each side. A copy that was cropped then correlates with one of the parts of
the photo it was made from, and a mirrored one does so after it is mirrored back. All photos are compared by products of
matrices in blocks. Of more than `MAX_COMPARED` photos, only those are compared whose descriptions lie near the same
center, of several hundred (an inverted file index); so the time grows with N^1.5 instead of N².

Perceptual hashes (DCT, wavelets) were tried: they tell photos that were resized or compressed, and lose those that were
cropped by 10 % of a side.
"""

from dataclasses import dataclass

import numpy as np
import torch

from regraft.data.checks.thumbnails import SIDE

CELLS = 8  # in each direction
MIN_CONTRAST = 2.0  # gray levels; flatter photos resemble any other flat one
MIN_SIMILARITY = 0.76  # correlation of the descriptions of a copy and a part, which lies somewhat beside it
NEIGHBOURS = 8  # of each photo that are looked at closely
BLOCK = 256  # photos
MAX_COMPARED = 8192
PROBED = 3  # centers near a photo, and near its mirror image
ITERATIONS = 6  # of k-means


@dataclass(frozen=True)
class Candidates:
    """Pairs of photos, where the first resembles a part of the second.

    Attributes:
        first: (P,) of int64.
        second: (P,) of int64.
        is_mirrored: (P,) of bool: whether the first has to be mirrored.
        parts: (P, 4): left, right, top and bottom of the part, as shares of the sides.
    """

    first: torch.Tensor
    second: torch.Tensor
    is_mirrored: torch.Tensor
    parts: torch.Tensor

    def __len__(self) -> int:
        return len(self.first)


def _parts() -> list[tuple[float, float, float, float]]:
    squares = [(0.0, 1.0, 0.0, 1.0)]
    for side, places in ((0.9, 2), (0.8, 3), (0.7, 4)):
        starts = np.linspace(0, 1 - side, places).tolist()
        squares += [(left, left + side, top, top + side) for left in starts for top in starts]
    return squares


PARTS = _parts()


def find_candidates(pixels: torch.Tensor) -> Candidates:
    """Return the pairs that may be near-duplicates, each once, from thumbnails (N, SIDE, SIDE) of uint8."""
    described = torch.cat([_describe(block) for block in pixels.split(BLOCK)]) if len(pixels) else None
    if described is None or len(pixels) < 2:
        return _merged([])
    if len(pixels) <= MAX_COMPARED:
        everything = torch.arange(len(pixels))
        return _merged([_compare(described, rows, everything) for rows in everything.split(BLOCK)])
    return _merged(
        [_compare(described, rows, members) for queries, members in _cells(described) for rows in queries.split(BLOCK)]
    )


def _describe(pixels: torch.Tensor) -> torch.Tensor:
    """Return the descriptions of thumbnails, mirrored and in parts, (N, 1 + PARTS, CELLS²) of float16."""
    gray = pixels.float()
    whole = _average(0.0, 1.0)
    values = [whole @ gray.flip(2) @ whole.T]
    values += [_average(top, bottom) @ gray @ _average(left, right).T for left, right, top, bottom in PARTS]
    cells = torch.stack(values, 1).flatten(2)
    cells = cells - cells.mean(2, keepdim=True)
    norms = cells.norm(dim=2, keepdim=True)
    return torch.where(norms > MIN_CONTRAST * CELLS, cells / norms, 0.0).half()


def _average(start: float, stop: float) -> torch.Tensor:
    """Return the matrix (CELLS, SIDE) that averages the pixels from `start` to `stop` over cells."""
    edges = torch.linspace(start * SIDE, stop * SIDE, CELLS + 1)
    places = torch.arange(SIDE)
    overlap = torch.minimum(edges[1:, None], places + 1.0) - torch.maximum(edges[:-1, None], places.float())
    return overlap.clamp(min=0) / (edges[1:] - edges[:-1])[:, None]


Rows = tuple[torch.Tensor, ...]  # first, second, mirrored, part, similarity


def _compare(described: torch.Tensor, rows: torch.Tensor, members: torch.Tensor) -> Rows:
    """Return the members that have parts most like each of some photos."""
    queries = described[rows, :2].float().flatten(0, 1)  # (2 n, D): mirrored, as it is
    best, places = [], []
    for block in members.split(BLOCK):
        parts = described[block, 1:].float()  # (m, PARTS, D)
        values, place = (queries @ parts.flatten(0, 1).T).view(len(queries), len(block), -1).max(2)
        best.append(values)
        places.append(place)
    values, place = torch.cat(best, 1).view(len(rows), 2, -1), torch.cat(places, 1).view(len(rows), 2, -1)
    values, side = values.max(1)  # (n, M)
    values = values.where(rows[:, None] != members[None], -1.0)
    values, columns = values.topk(min(NEIGHBOURS, len(members)), 1)
    is_like = values >= MIN_SIMILARITY
    query, _ = is_like.nonzero(as_tuple=True)
    column = columns[is_like]
    mirrored = side[query, column]
    return rows[query], members[column], mirrored == 0, place[query, mirrored, column], values[is_like]


def _merged(found: list[Rows]) -> Candidates:
    """Return each pair once, in the direction and with the part that fit best."""
    if not found:
        none = torch.zeros(0, dtype=torch.int64)
        return Candidates(none, none, none.bool(), torch.zeros(0, 4))
    first, second, is_mirrored, place, values = (torch.cat(columns) for columns in zip(*found, strict=True))
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    order = torch.from_numpy(np.lexsort((-values.numpy(), high.numpy(), low.numpy())))
    low, high = low[order], high[order]
    is_new = torch.ones(len(order), dtype=torch.bool)
    is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    kept = order[is_new]
    return Candidates(first[kept], second[kept], is_mirrored[kept], torch.tensor(PARTS)[place[kept]])


def _cells(described: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return for each center the photos near it, and the photos of which a part lies nearest to it."""
    count = max(1, len(described) // BLOCK * 4)
    generator = torch.Generator().manual_seed(0)
    sample = described[torch.randperm(len(described), generator=generator)[: 32 * count], 1].float()
    centers = sample[:count].clone()
    for _ in range(ITERATIONS):
        nearest = torch.cat([(rows @ centers.T).argmax(1) for rows in sample.split(4096)])
        centers = torch.zeros_like(centers).index_add_(0, nearest, sample)
        centers = centers / centers.norm(dim=1, keepdim=True).clamp(min=1e-6)
    probed, assigned = [], []
    for block in described.split(BLOCK):
        values = block.float() @ centers.T  # (n, 1 + PARTS, C)
        probed.append(values[:, :2].topk(min(PROBED, count), 2).indices.flatten(1))
        assigned.append(values[:, 1:].argmax(2))
    probes, parts = torch.cat(probed), torch.cat(assigned)
    pairs = zip(_by_cell(probes, count), _by_cell(parts, count), strict=True)
    return [(queries.unique(), members.unique()) for queries, members in pairs if len(queries) and len(members)]


def _by_cell(cells: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Return the rows that name each cell, from the cells (N, V) that each row names."""
    rows = torch.arange(len(cells)).repeat_interleave(cells.shape[1])
    order = cells.flatten().argsort(stable=True)
    sizes = torch.bincount(cells.flatten(), minlength=count).tolist()
    return rows[order].split(sizes)
