"""How precisely cached values are kept: as they are, in 16 bits, or in 8."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

Precision = Literal["full", "bf16", "fp16", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {
    "full": 1e-3,
    "fp16": 1e-2,
    "bf16": 5e-2,
    "int8": 5e-2,
}  # of the largest value, rounding of layers included
STEPS = 127  # of int8, from 0 to the largest value of a row


def packed(tensors: Sequence[torch.Tensor], precision: Precision) -> list[torch.Tensor]:
    """Return what is kept of a few tensors (N, …): floating ones in `precision`, others as they are.

    With `int8`, each row is divided by its largest absolute value, which is kept beside it as (N,) of float32: a value
    is wrong by 1/254 of it at most.
    """
    found: list[torch.Tensor] = []
    for tensor in tensors:
        if precision == "full" or not tensor.is_floating_point():
            found.append(tensor)
        elif precision == "int8":
            rows = tensor.float().reshape(len(tensor), -1)  # (N, numbers of a row), of (N,) as well
            largest = rows.abs().amax(1)
            steps = (rows / largest.clamp(min=1e-30)[:, None] * STEPS).round()
            found += [steps.to(torch.int8).view(tensor.shape), largest]
        else:
            found.append(tensor.to(HALVES[precision]))
    return found


def unpacked(
    kept: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], precision: Precision
) -> tuple[torch.Tensor, ...]:
    """Return tensors of the given types from what was kept of them."""
    coming = iter(kept)
    found: list[torch.Tensor] = []
    for dtype in dtypes:
        tensor = next(coming)
        if precision == "int8" and dtype.is_floating_point:
            scale = (next(coming) / STEPS).view(-1, *[1] * (tensor.ndim - 1))
            tensor = tensor.to(torch.float32) * scale
        found.append(tensor.to(dtype))
    return tuple(found)


def packed_bytes(count: int, shape: Sequence[int], dtype: torch.dtype, precision: Precision) -> int:
    """Return what `count` rows of a tensor need."""
    numbers = torch.Size(shape).numel()
    if precision == "full" or not dtype.is_floating_point:
        return count * numbers * dtype.itemsize
    return count * (numbers + 4) if precision == "int8" else count * numbers * 2
