"""Precision of cached values: full, 16 bits or 8 bits."""

from collections.abc import Sequence
from typing import Literal

import torch

Precision = Literal["full", "bf16", "fp16", "int8"]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {
    "full": 1e-3,
    "fp16": 1e-2,
    "bf16": 5e-2,
    "int8": 5e-2,
}  # shares of the largest value, including the rounding inside of layers
STEPS = 127  # int8 levels from 0 to the largest value of a row


def packed(tensors: Sequence[torch.Tensor], precision: Precision) -> list[torch.Tensor]:
    """Convert tensors (N, …) for the cache: floating-point ones to `precision`, others unchanged.

    With `int8`, each row is divided by its largest absolute value, which is stored as a further tensor (N,) of float32.
    The error of a value is at most 1/254 of that maximum.
    """
    kept: list[torch.Tensor] = []
    for tensor in tensors:
        if precision == "full" or not tensor.is_floating_point():
            kept.append(tensor)
        elif precision == "int8":
            rows = tensor.float().reshape(len(tensor), -1)  # (N, values of a row); (N,) becomes (N, 1)
            largest = rows.abs().amax(1)
            steps = (rows / largest.clamp(min=1e-30)[:, None] * STEPS).round()
            kept += [steps.to(torch.int8).view(tensor.shape), largest]
        else:
            kept.append(tensor.to(HALVES[precision]))
    return kept


def unpacked(
    kept: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], precision: Precision
) -> tuple[torch.Tensor, ...]:
    """Return the tensors that `packed` converted, in their original dtypes."""
    remaining = iter(kept)
    restored: list[torch.Tensor] = []
    for dtype in dtypes:
        tensor = next(remaining)
        if precision == "int8" and dtype.is_floating_point:
            scale = (next(remaining) / STEPS).view(-1, *[1] * (tensor.ndim - 1))
            tensor = tensor.to(torch.float32) * scale
        restored.append(tensor.to(dtype))
    return tuple(restored)


def packed_bytes(count: int, shape: Sequence[int], dtype: torch.dtype, precision: Precision) -> int:
    """Return the bytes of `count` packed rows of a tensor."""
    numbers = torch.Size(shape).numel()
    if precision == "full" or not dtype.is_floating_point:
        return count * numbers * dtype.itemsize
    return count * (numbers + 4) if precision == "int8" else count * numbers * 2
