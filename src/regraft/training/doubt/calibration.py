"""How sure the probabilities of a trained network are, and the factor on its scores that makes them right."""

from dataclasses import dataclass

import torch

from regraft.training.heads.calibration import fit_factor
from regraft.training.metrics import calibration_error

MIN_PHOTOS = 20  # for a factor


@dataclass(frozen=True)
class Calibration:
    """Calibration of the probabilities on the validation photos.

    Attributes:
        factor: Factor on the scores, the inverse of the temperature.
        error_before: Expected calibration error without it, see `Metrics.calibration_error`.
        error_after: The same with it.
        is_from_training: Whether the factor was fitted on training photos that were left out; else on one half of the
            validation photos for the other, and on all of them for use.
    """

    factor: float
    error_before: float
    error_after: float
    is_from_training: bool

    def __str__(self) -> str:
        where = "training photos that were left out" if self.is_from_training else "the validation photos"
        return (
            f"calibration error {self.error_before:.3f}, {self.error_after:.3f} with scores times {self.factor:.3g} "
            f"(fitted on {where})"
        )


def calibrate(outputs: torch.Tensor, targets: torch.Tensor) -> Calibration | None:
    """Fit the factor for scores (N, K) and classes (N,) of the validation photos; None if there are too few."""
    if len(targets) < MIN_PHOTOS or outputs.ndim != 2 or outputs.shape[1] < 2 or not bool(outputs.isfinite().all()):
        return None
    calibrated = outputs.clone()
    for half in (0, 1):  # each half with the factor of the other
        learned = torch.arange(len(targets)) % 2 != half
        calibrated[~learned] *= _factor(outputs[learned], targets[learned])
    before, after = calibration_error(outputs, targets), calibration_error(calibrated, targets)
    return Calibration(_factor(outputs, targets), before, after, False)


def _factor(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return fit_factor(outputs, targets, torch.ones(len(targets)), len(targets))
