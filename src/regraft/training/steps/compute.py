"""Device and precision of a computation."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.arguments import usable_device
from regraft.training.ranks.group import SINGLE, Ranks

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ComputeContext:
    """Device and precision of the computation.

    Attributes:
        device: The torch device.
        autocast_dtype: bfloat16 or float16 for mixed precision; None for plain float32.
        has_channels_last: Whether feature maps (N, C, H, W) are in channels-last memory format, in which convolutions
            are faster, and equal up to rounding.
        input_dtype: Type to which floating-point images are cast; None: no cast.
        ranks: The processes that share the computation.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    has_channels_last: bool = False
    input_dtype: torch.dtype | None = None
    ranks: Ranks = SINGLE

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the device is the thread's own, where decoders and pinned memory ask for one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def scaler(self, *, may_guard: bool = False) -> torch.amp.GradScaler:
        """Return a gradient scaler: disabled unless the precision is float16, or else a `step_guard` where allowed."""
        if may_guard and self.autocast_dtype != torch.float16:
            return self.step_guard()
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)

    def step_guard(self) -> torch.amp.GradScaler:
        """Return a scaler that does not scale: the device leaves out steps whose gradient is not finite.

        A fused optimizer then needs nobody to read the loss before its step; see `is_step_guard`.
        """
        return torch.amp.GradScaler(self.device.type, init_scale=1.0, growth_interval=2**31 - 1)

    def is_step_guard(self, scaler: torch.amp.GradScaler) -> bool:
        """Return whether a scaler is one of `step_guard`."""
        return scaler.is_enabled() and self.autocast_dtype != torch.float16


def choose_compute(device: str | torch.device, precision: str) -> ComputeContext:
    """Resolve the options `device` and `precision`; see `TrainConfig`.

    Raises:
        ModelError: The device does not exist.
    """
    chosen = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return ComputeContext(chosen, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])


@contextlib.contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Hold convolution weights in channels-last memory format for the block; no value changes."""
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for layer in convolutions:
            layer.to(memory_format=torch.contiguous_format)
