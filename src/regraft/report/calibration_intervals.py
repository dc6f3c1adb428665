"""How sure an expected calibration error is: a bootstrap interval, and what chance alone would show.

The error is a mean of absolute values, so it is above zero for a perfectly calibrated model too, and the more so the
fewer the samples. A plain percentile interval of bootstrap draws then never reaches down to zero (in a simulation: 0 of
450 intervals), and the bias-corrected one seldom does. So the interval is bias-corrected, and begins at zero where a
perfectly calibrated model would show an error as large in more than 5 % of the draws.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch

BINS = 10
DRAWS, DRAWS_OF_MANY, MANY_SAMPLES = 1000, 200, 5000
MAX_ELEMENTS = 4_000_000  # of a chunk of draws


@dataclass(frozen=True)
class CalibrationInterval:
    """The uncertainty of an expected calibration error.

    Attributes:
        low: Lower end of the 95 % interval.
        high: Upper end.
        chance: The error below which 95 % of draws lie if the model is perfectly calibrated.
    """

    low: float
    high: float
    chance: float


def calibration_interval(outputs: torch.Tensor, targets: torch.Tensor, *, seed: int = 0) -> CalibrationInterval:
    """Return the uncertainty of the expected calibration error, see `Metrics.calibration_error`.

    Source: Efron 1987, Better bootstrap confidence intervals (bias correction); Bröcker and Smith 2007, Increasing the
    reliability of reliability diagrams (draws of a calibrated model).

    Args:
        outputs: Scores (N, K).
        targets: Classes (N,).
        seed: Seed of the draws.
    """
    confidence, predicted = outputs.softmax(1).double().max(1)
    is_right = (predicted == targets).double()
    bins = torch.nn.functional.one_hot((confidence * BINS).long().clamp(0, BINS - 1), BINS).double()  # (N, bins)
    gaps = confidence - is_right
    error = _error(gaps[None], bins).item()
    generator = torch.Generator().manual_seed(seed)
    draws, chance = _draw(confidence, gaps, bins, generator)
    normal, share = NormalDist(), (draws < error).double().mean().item()
    shift = 2 * normal.inv_cdf(min(max(share, 0.5 / len(draws)), 1 - 0.5 / len(draws)))
    low, high = (draws.quantile(normal.cdf(shift + normal.inv_cdf(end))).item() for end in (0.025, 0.975))
    by_chance = chance.quantile(0.95).item()
    return CalibrationInterval(0.0 if error <= by_chance else min(low, error), max(high, error), by_chance)


def _draw(
    confidence: torch.Tensor, gaps: torch.Tensor, bins: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return errors of samples drawn with replacement, and of outcomes drawn by the confidence; (draws,) each."""
    count = len(gaps)
    left = DRAWS if count <= MANY_SAMPLES else DRAWS_OF_MANY
    draws, chance = [], []
    while left > 0:
        rows = min(left, max(1, MAX_ELEMENTS // count))
        left -= rows
        chosen = torch.randint(count, (rows, count), generator=generator)
        weights = torch.zeros(rows, count, dtype=torch.double)
        weights.scatter_add_(1, chosen, torch.ones_like(weights))
        draws.append(_error(weights * gaps, bins))
        outcomes = (torch.rand(rows, count, generator=generator, dtype=torch.double) < confidence).double()
        chance.append(_error(confidence - outcomes, bins))
    return torch.cat(draws), torch.cat(chance)


def _error(gaps: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Return the expected calibration error (R,) of rows of gaps (R, N) in bins (N, bins)."""
    return (gaps @ bins).abs().sum(1) / gaps.shape[1]
