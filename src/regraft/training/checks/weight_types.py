"""The dtypes of a network's weights: the precision to compute in, and which can be trained."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from regraft.errors import ConfigError, ModelError
from regraft.training.steps.compute import HALVES, ComputeContext, choose_compute
from regraft.wording import option

FLOATING = (*HALVES, torch.float32, torch.float64)
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_for(model: nn.Module, device: str | torch.device, precision: str = "fp32") -> ComputeContext:
    """Return device and precision for a network, see `choose_compute`.

    Images are cast to the dtype of the first floating-point weight, as in `summary`. Autocast is for float32 weights: a
    network without such weights runs in its own dtype.

    Raises:
        ModelError: The device does not exist.
        ConfigError: The requested precision cannot be reached from weights of this dtype.
    """
    compute = choose_compute(device, precision)
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.dtype in FLOATING]
    input_dtype = dtypes[0] if dtypes else None
    if not dtypes or torch.float32 in dtypes:
        return replace(compute, input_dtype=input_dtype)
    if precision in NAMES and NAMES[precision] not in dtypes:
        raise ConfigError(
            f"{option('precision', precision)} casts weights in float32, and those of {type(model).__name__} are in "
            f"{type_names(model.parameters())}. Convert them with model.float(), or leave the option out."
        )
    return replace(compute, autocast_dtype=None, input_dtype=input_dtype)


def require_trainable_types(model: nn.Module, *, thaws_all: bool) -> None:
    """Refuse to train weights in float16 or 8-bit floats; with `thaws_all`, frozen weights too.

    In float16, gradients below 6e-8 underflow to zero, and so does the epsilon of Adam, which would divide by zero. The
    type is for the forward pass alone, with weights in float32 (`--precision fp16`). The same holds for 8 bits.

    Raises:
        ModelError: A weight to be trained has such a dtype; the message names it. Nothing was changed.
    """
    for name, parameter in model.named_parameters():
        dtype = parameter.dtype
        has_no_room = dtype == torch.float16 or (dtype.is_floating_point and dtype.itemsize < 2)
        if has_no_room and (thaws_all or parameter.requires_grad):
            raise ModelError(
                f"'{name}' of {type(model).__name__} cannot be trained in {type_names([parameter])}, in which "
                "gradients and steps vanish. Convert the model with model.float(); for speed, pass "
                f"{option('precision', 'fp16')}."
            )


def type_names(tensors: Iterable[torch.Tensor]) -> str:
    """Return the names of the dtypes of some tensors as text."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "no type"
