"""The types of a network's own weights: which engine suits them, and which can be trained."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from regraft.errors import ConfigError, ModelError
from regraft.training.loop import HALVES, ComputeContext, choose_compute

FLOATING = (*HALVES, torch.float32, torch.float64)
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compute_for(model: nn.Module, device: str | torch.device, precision: str = "fp32") -> ComputeContext:
    """Return the engine for a network, see `choose_compute`.

    Images are cast to the type of the first floating weight, as in `summary`. Autocast casts float32: a network without
    such weights runs in its own type.

    Raises:
        ModelError: The device does not exist.
        ConfigError: A precision was asked for by name that weights of this type cannot be cast to.
    """
    compute = choose_compute(device, precision)
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.dtype in FLOATING]
    input_dtype = dtypes[0] if dtypes else None
    if not dtypes or torch.float32 in dtypes:
        return replace(compute, input_dtype=input_dtype)
    if precision in NAMES and NAMES[precision] not in dtypes:
        raise ConfigError(
            f"--precision {precision} casts weights in float32, and those of {type(model).__name__} are in "
            f"{type_names(model.parameters())}. Convert them with model.float(), or leave the option out."
        )
    return replace(compute, autocast_dtype=None, input_dtype=input_dtype)


def require_trainable_types(model: nn.Module, *, thaws_all: bool) -> None:
    """Refuse to train weights whose type has no room for gradients and steps; with `thaws_all` those frozen as well.

    In float16, gradients below 6e-8 are zero, and so is the epsilon of Adam, by which it would divide: that type is
    for the forward pass alone, with weights in float32 beside it (`--precision fp16`). The same goes for 8 bits.

    Raises:
        ModelError: A weight that would be trained has such a type; the message says which. Nothing was changed.
    """
    for name, parameter in model.named_parameters():
        dtype = parameter.dtype
        has_no_room = dtype == torch.float16 or (dtype.is_floating_point and dtype.itemsize < 2)
        if has_no_room and (thaws_all or parameter.requires_grad):
            raise ModelError(
                f"'{name}' of {type(model).__name__} cannot be trained in {type_names([parameter])}, in which "
                "gradients and steps vanish. Convert the model with model.float(); for speed, pass precision='fp16'."
            )


def type_names(tensors: Iterable[torch.Tensor]) -> str:
    """Return the types of some tensors in words."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "no type"
