"""What of a model can be kept in a file: tensors with bytes of their own, of types that safetensors has."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.checkpoint.file.layout import DTYPES, PACKED
from regraft.errors import CheckpointError

PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
HALF_BYTES = tuple(DTYPES[name] for name in PACKED)  # two numbers in a byte, which the last side counts


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, as a file holds them; the extra state of a layer included.

    Raises:
        CheckpointError: The extra state of a layer is something else that is worth keeping.
    """
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:  # which get_extra_state returns where it has nothing to say
            raise CheckpointError(
                f"cannot save '{name}': get_extra_state of the layer returns a value of type {type(value).__name__}, "
                "and a safetensors file holds tensors only. Let it return a tensor or None. Nothing was written."
            )
    return tensors


def require_storable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that a safetensors file cannot hold.

    Raises:
        CheckpointError: There is one; it is named, with the kind that it is of and a way out. Nothing was written.
    """
    require_bytes(tensors)
    for name, tensor in tensors.items():
        kind = str(tensor.dtype) if tensor.dtype not in DTYPES.values() else None
        if tensor.dtype in HALF_BYTES and not tensor.ndim:
            kind = f"a single number of {tensor.dtype}"
        if kind:
            raise CheckpointError(
                f"cannot save '{name}': it is {kind}; a safetensors file cannot hold that. Expected one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES.values())}. Convert it first, as "
                "with torch.view_as_real for complex numbers. Nothing was written."
            )


def require_bytes(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are no plain array of numbers in memory.

    Raises:
        CheckpointError: There is one; it is named, with the kind that it is of and a way out. Nothing was written.
    """
    for name, tensor in tensors.items():
        problem = _problem(tensor) if isinstance(tensor, torch.Tensor) else None  # else the extra state of a layer
        if problem is not None:
            raise CheckpointError(f"the tensor '{name}' has no bytes to keep or to compare: {problem}")


def _problem(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be stored and what to do; None where it can."""
    if is_lazy(tensor):
        return "its shape is not known yet. Run the network on one batch first. Nothing was written."
    if tensor.is_nested:
        return "it is nested. Keep its parts, or torch.nested.to_padded_tensor(…). Nothing was written."
    if tensor.layout != torch.strided:
        return f"it is of layout {str(tensor.layout).removeprefix('torch.')}. Use .to_dense(). Nothing was written."
    if tensor.is_quantized:
        return f"it is quantized ({tensor.dtype}). Use .dequantize(), or save before quantizing. Nothing was written."
    if tensor.is_meta:
        return "it is on the meta device, without values. Load weights into the network first. Nothing was written."
    if type(tensor) not in PLAIN and not _has_memory(tensor):
        return (
            f"it is a {type(tensor).__name__}, which keeps its numbers in other tensors (or has none). Save before "
            "quantizing or sharding, or use the library that made it. Nothing was written."
        )
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        storage = tensor.untyped_storage()
        return storage.device.type != "meta" and (tensor.numel() == 0 or storage.data_ptr() != 0)
    except (NotImplementedError, RuntimeError, AttributeError):
        return False
