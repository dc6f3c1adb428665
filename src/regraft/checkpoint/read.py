"""Read a checkpoint back: the architecture from its recipe, then the weights."""

import os
from pathlib import Path

import torch
from torch import nn

from regraft.anatomy.paths import parent_and_name
from regraft.card import ATTRIBUTE
from regraft.checkpoint.build import rebuild
from regraft.checkpoint.digest import tensor_digest
from regraft.checkpoint.foreign import read_tensors
from regraft.checkpoint.format import Header, read_header
from regraft.errors import CheckpointError
from regraft.freezing.pins import sync_pins


def load(path: str | os.PathLike[str], *, device: str = "cpu", trust_code: bool = False) -> nn.Module:
    """Load a checkpoint that `save` wrote: architecture, weights, class names, preprocessing and what was frozen.

    Args:
        path: The file.
        device: Where the model goes, as in `"cpu"` or `"cuda"`.
        trust_code: Whether a class of your own that the recipe names (`py:…`) may be imported. The file never says so
            itself.

    Returns:
        The model in evaluation mode; each tensor is bit-identical to the one that was saved.

    Raises:
        CheckpointError: The file cannot be read, has no recipe, does not match it, or is damaged.
        TrustError: The recipe names a class of your own and `trust_code` is false.
    """
    source = Path(path)
    header = read_header(source)
    if header is None or header.card.recipe is None:
        raise CheckpointError(
            f"'{source}' has tensors but no recipe, so its architecture is unknown. "
            "Use load_weights(model, path) with a model of your own."
        )
    model = rebuild(header.card.recipe, trust_code=trust_code)
    tensors, _ = read_tensors(source)
    _verify(source, header, tensors)
    _tie(model, header.shared)
    slots = model.state_dict(keep_vars=True)
    for name in [*slots, *tensors]:
        if name not in tensors or name not in slots or tensors[name].shape != slots[name].shape:
            raise CheckpointError(
                f"'{source}' does not match its own recipe at '{name}': {_shape(tensors, name)} in the file, "
                f"{_shape(slots, name)} in the model. Was the class changed since, or another library version used?"
            )
    for name, slot in slots.items():
        slot.data = tensors[name].clone()  # out of the mapped file: aligned, and safe from whoever changes the file
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in header.frozen)
    setattr(model, ATTRIBUTE, header.card)
    sync_pins(model)
    return model.eval().to(device)


def _tie(model: nn.Module, shared: dict[str, str]) -> None:
    """Make one tensor of those that were one when they were saved, where the architecture itself does not."""
    slots = model.state_dict(keep_vars=True)
    for alias, name in shared.items():
        if alias in slots and name in slots and slots[alias] is not slots[name]:
            parent, attribute = parent_and_name(alias)
            setattr(model.get_submodule(parent), attribute, slots[name])


def _verify(path: Path, header: Header, tensors: dict[str, torch.Tensor]) -> None:
    for name, digest in header.digests.items():
        if name not in tensors or tensor_digest(tensors[name]) != digest:
            raise CheckpointError(f"'{path}' is damaged: '{name}' is not what was saved. Get or make it again.")


def _shape(tensors: dict[str, torch.Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "nothing"
