"""Whether two photos are the same picture: one is laid over the other as well as possible, then they are compared.

The part of the second photo that shows the first, its left, right, top and bottom, is found by Gauss-Newton steps on
the difference of gray values, with free brightness and contrast (the inner loop of image registration), first on
16 × 16 pixels, then on 32 × 32, for all pairs at once. A copy then agrees everywhere but for compression: in each of
64 blocks, and in its fine detail. Two photos of similar things agree on the whole, but not in each block.

Source: B. D. Lucas and T. Kanade, IJCAI 1981; G. D. Evangelidis and E. Z. Psarakis, 2008, doi:10.1109/TPAMI.2008.113.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from regraft.data.checks.candidates import Candidates
from regraft.data.checks.thumbnails import SIDE

MAX_BLOCK_ERROR = 0.36  # root of the mean square in the worst block, in standard deviations of the photo
MIN_DETAIL = 0.96  # correlation of what is finer than about 8 of 32 pixels
STAGES = ((16, 2, 0.88), (16, 3, 0.93), (32, 4, 0.95), (32, 4, 0.0))  # pixels of a side, steps, least correlation
MAX_STEP, MIN_SCALE, MAX_SCALE, MAX_SHIFT = 0.1, 0.4, 1.2, 0.6
PAIRS = 1024  # in a batch
KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


@dataclass(frozen=True)
class Agreement:
    """How far pairs of photos agree, laid over each other.

    Attributes:
        correlation: (P,) of all gray values.
        detail: (P,) of the fine detail alone.
        block_error: (P,): difference in the worst of 64 blocks, in standard deviations of the photo.
    """

    correlation: torch.Tensor
    detail: torch.Tensor
    block_error: torch.Tensor

    @property
    def is_same(self) -> torch.Tensor:
        """Whether a pair shows the same picture, (P,) of bool."""
        return (self.block_error <= MAX_BLOCK_ERROR) & (self.detail >= MIN_DETAIL)


def align(pixels: torch.Tensor, pairs: Candidates) -> Agreement:
    """Compare pairs of photos by their thumbnails (N, SIDE, SIDE) of uint8; pairs far from agreeing get zeros."""
    count = len(pairs)
    correlation, detail, error = torch.zeros(count), torch.zeros(count), torch.full((count,), torch.inf)
    for rows in torch.arange(count).split(PAIRS):
        first, second = pixels[pairs.first[rows]].float(), pixels[pairs.second[rows]].float()
        first = torch.where(pairs.is_mirrored[rows, None, None], first.flip(2), first)
        left, right, top, bottom = pairs.parts[rows].unbind(1)
        place = torch.stack([right - left, bottom - top, left + right - 1, top + bottom - 1], 1)
        for number, (side, steps, least) in enumerate(STAGES):
            if not len(rows):
                break
            blurs = 1 if number < len(STAGES) - 1 else 0
            of_first, of_second = _filtered(first, side, blurs), _filtered(second, 2 * side, 2 * blurs)
            place, reached = _registered(of_first, of_second, place, steps)
            kept = reached >= least
            rows, first, second, place = rows[kept], first[kept], second[kept], place[kept]
            first, second, place = _smaller_first(first, second, place)
        if len(rows):
            correlation[rows], detail[rows], error[rows] = _compared(first, second, place)
    return Agreement(correlation, detail, error)


def _registered(
    first: torch.Tensor, second: torch.Tensor, place: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return better places of the first photos in the second ones, and the correlations there.

    Args:
        first: (P, side, side).
        second: (P, S, S).
        place: (P, 4): width, height and center (x, y) of the part of the second photo, which spans from -1 to 1.
        steps: Number of steps.
    """
    side, scale = first.shape[-1], second.shape[-1] / 4
    padded = F.pad(second, (1, 1, 1, 1), mode="replicate")
    slope_x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) * scale
    slope_y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) * scale
    fields, target = torch.stack([second, slope_x, slope_y], 1), _standard(first)
    best, best_place = torch.full((len(place),), -1.0), place
    for step in range(steps + 1):
        grid, line = _grid(place, side)
        values, across, down = F.grid_sample(fields, grid, padding_mode="border", align_corners=False).unbind(1)
        centered = values - values.mean((1, 2), keepdim=True)
        norm = centered.flatten(1).norm(dim=1).clamp(min=1e-3)
        correlation = (centered * target).sum((1, 2)) / norm
        is_better = correlation > best
        best, best_place = best.where(~is_better, correlation), place.where(is_better[:, None], best_place)
        if step == steps:
            break
        columns = [across * line, down * line[:, None], across, down, centered, torch.ones_like(values)]
        jacobian = torch.stack(columns, -1).flatten(1, 2)  # (P, side², 6)
        residual = (target * norm[:, None, None] - centered).flatten(1)[..., None]
        normal = jacobian.mT @ jacobian
        normal = normal + torch.diag_embed(normal.diagonal(dim1=1, dim2=2) * 1e-3 + 1e-3)
        change = torch.linalg.solve(normal, jacobian.mT @ residual)[:, :4, 0].clamp(-MAX_STEP, MAX_STEP)
        place = place + change
        sizes, centers = place[:, :2].clamp(MIN_SCALE, MAX_SCALE), place[:, 2:].clamp(-MAX_SHIFT, MAX_SHIFT)
        place = torch.cat([sizes, centers], 1)
    return best_place, best


def _smaller_first(
    first: torch.Tensor, second: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exchange the photos of pairs where the first shows more than the second, of which it could not be a part."""
    is_larger = place[:, :2].prod(1) > 1
    inverse = torch.cat([1 / place[:, :2], -place[:, 2:] / place[:, :2]], 1)
    wide = is_larger[:, None, None]
    return (
        torch.where(wide, second, first),
        torch.where(wide, first, second),
        torch.where(is_larger[:, None], inverse, place),
    )


def _compared(
    first: torch.Tensor, second: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return correlation, correlation of detail, and error of the worst block at 32 × 32 pixels, (P,) each."""
    grid, _ = _grid(place, SIDE)
    moved = F.grid_sample(second[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    one, other = (_filtered(photos, 32, 1) for photos in (first, moved))
    fine_one, fine_other = (_standard(photos - _filtered(photos, 32, 3)) for photos in (one, other))
    one, other = _standard(one), _standard(other)
    errors = F.avg_pool2d(((one - other) * 32).square(), 4)  # (P, 8, 8)
    return (one * other).sum((1, 2)), (fine_one * fine_other).sum((1, 2)), errors.amax((1, 2)).sqrt()


def _grid(place: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points of a part on `side` × `side` pixels, (P, side, side, 2), and their places in it, (side,)."""
    line = torch.linspace(-1 + 1 / side, 1 - 1 / side, side)
    x = place[:, 0, None] * line + place[:, 2, None]
    y = place[:, 1, None] * line + place[:, 3, None]
    return torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1), line


def _standard(values: torch.Tensor) -> torch.Tensor:
    """Return values (P, H, W) with mean 0 and norm 1."""
    values = values - values.mean((1, 2), keepdim=True)
    return values / values.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-3)


def _filtered(photos: torch.Tensor, side: int, blurs: int) -> torch.Tensor:
    """Return photos (P, H, H) averaged to `side` × `side` pixels, then blurred a number of times."""
    matrix = _filter(photos.shape[-1], side, blurs)
    return matrix @ photos @ matrix.T


@functools.cache
def _filter(size: int, side: int, blurs: int) -> torch.Tensor:
    """Return the matrix (side, size) of an average over `size / side` pixels, then of binomial filters of five."""
    matrix = torch.eye(side).repeat_interleave(size // side, 1) / (size // side)
    for _ in range(blurs):
        padded = torch.cat([matrix[:1].expand(2, -1), matrix, matrix[-1:].expand(2, -1)])
        matrix = sum((weight * padded[at : at + side] for at, weight in enumerate(KERNEL)), torch.zeros_like(matrix))
    return matrix
