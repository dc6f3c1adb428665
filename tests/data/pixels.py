"""Pixels to write into files, and to compare."""

import numpy as np
import torch

from regraft.card import Preprocessing

SIDE = 36
AS_IS = Preprocessing(size=32, resize=SIDE)  # the shorter side is SIDE already: nothing is resized
GRAY = Preprocessing(size=32, resize=SIDE, mean=(0.5,), std=(0.5,))


def noise(*shape: int, top: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


def as_array(pixels: torch.Tensor) -> np.ndarray:
    """Return (H, W, C)."""
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())
