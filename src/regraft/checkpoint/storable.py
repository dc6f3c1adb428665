"""Which tensors have bytes of their own, that a file can hold and that can be compared."""

from collections.abc import Mapping

import torch
from torch.nn.parameter import is_lazy

from regraft.errors import CheckpointError

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def require_storable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are no plain array of numbers in memory.

    Raises:
        CheckpointError: There is one; it is named, with the kind that it is of and a way out. Nothing was written.
    """
    for name, tensor in tensors.items():
        problem = _problem(tensor) if isinstance(tensor, torch.Tensor) else None  # else the extra state of a layer
        if problem is not None:
            raise CheckpointError(f"the tensor '{name}' has no bytes to keep or to compare: {problem}")


def _problem(tensor: torch.Tensor) -> str | None:
    """Say why a tensor cannot be stored and what to do; None where it can."""
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
