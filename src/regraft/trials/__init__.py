"""Trials: the same photos, learned in several ways, over numbers of images and seeds."""

from regraft.trials.comparing import compare
from regraft.trials.comparison import Comparison

__all__ = ["Comparison", "compare"]
