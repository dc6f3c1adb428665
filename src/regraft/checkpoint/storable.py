"""Check that the tensors of a model can be stored: strided, in memory, of a dtype of safetensors."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.checkpoint.file.layout import DTYPES, PACKED
from regraft.errors import CheckpointError

PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
HALF_BYTES = tuple(DTYPES[name] for name in PACKED)  # two values per byte; the last dimension counts bytes


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's state dict, including extra states of layers.

    Raises:
        CheckpointError: The extra state of a layer is neither a tensor nor None.
    """
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is not None:  # None is the extra state of a layer without any
            raise CheckpointError(
                f"cannot save '{name}': get_extra_state of the layer returns a value of type {type(value).__name__}, "
                "and a safetensors file holds tensors only. Let it return a tensor or None. Nothing was written."
            )
    return tensors


def require_storable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that a safetensors file cannot hold.

    Raises:
        CheckpointError: There is one; the message names it, its kind, and what to do. Nothing was written.
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
    """Refuse tensors that are not strided arrays in memory.

    Raises:
        CheckpointError: There is one; the message names it, its kind, and what to do. Nothing was written.
    """
    for name, tensor in tensors.items():
        problem = _problem(tensor) if isinstance(tensor, torch.Tensor) else None  # otherwise the extra state of a layer
        if problem is not None:
            raise CheckpointError(f"the tensor '{name}' has no bytes to keep or to compare: {problem}")


def _problem(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be stored and what to do about it; None if it can."""
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
    """Return whether a tensor of a subclass has a storage with its values."""
    try:
        storage = tensor.untyped_storage()
        return storage.device.type != "meta" and (tensor.numel() == 0 or storage.data_ptr() != 0)
    except (NotImplementedError, RuntimeError, AttributeError):
        return False
