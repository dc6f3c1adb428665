"""Weights that a layer computes from other tensors: weight norm, spectral norm and pruning, in the file or the model.

torch has two spellings of each, `weight_g` and `parametrizations.weight.original0`; a plain layer has `weight`. If file
and model differ, the tensors are renamed, or the weight is computed from its parts as the layer computes it.

Sources: `torch.nn.utils.weight_norm`, `spectral_norm`, `prune`, and `torch.nn.utils.parametrizations`.
"""

from collections.abc import Mapping

import torch
from torch import nn

from regraft.checkpoint.foreign.state_dicts import Tensors


def without_reparametrization(model: nn.Module, tensors: Tensors, slots: Mapping[str, torch.Tensor]) -> Tensors:
    """Convert tensors of a file to the parametrization that each layer of a model has.

    Args:
        model: Its layers define the dimension along which they normalize.
        tensors: Tensors of the file by the names of the model.
        slots: Tensors of the model, by name.
    """
    result = dict(tensors)
    for base in dict.fromkeys(base for name in (*tensors, *slots) if (base := _base(name))):
        parts = _parts(base, tensors)
        model_parts = _parts(base, slots)
        if base in tensors and {"_g", "_v"} <= model_parts.keys() and base not in slots:
            weight = result.pop(base)
            result[model_parts["_g"]] = _norm(weight, slots[model_parts["_g"]])
            result[model_parts["_v"]] = weight
        elif parts and model_parts.keys() == parts.keys():
            for ending, name in parts.items():
                result[model_parts[ending]] = result.pop(name)
        elif parts and base in slots and base not in tensors:
            weight = _weight({ending: tensors[name] for ending, name in parts.items()}, model, base)
            if weight is not None:
                for name in parts.values():
                    del result[name]
                result[base] = weight
    return result


def _base(name: str) -> str:
    """Return the name of the weight that a tensor is a part of; empty for any other tensor."""
    parent, separator, rest = name.partition("parametrizations.")
    if separator and (not parent or parent.endswith(".")):
        return f"{parent}{rest.partition('.')[0]}"
    ending = next((ending for ending in ("_g", "_v", "_orig", "_u", "_mask") if name.endswith(ending)), "")
    return name.removesuffix(ending) if ending and name.rpartition(".")[2] != ending else ""


def _parts(base: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the parts of a weight, as older ending → name; empty where a part is missing."""
    parent = base[: len(base) - len(base.rpartition(".")[2])]
    below = f"{parent}parametrizations.{base[len(parent) :]}."
    if f"{below}original0" in tensors and f"{below}original1" in tensors and f"{below}original2" not in tensors:
        return {"_g": f"{below}original0", "_v": f"{below}original1"}
    if f"{below}original" in tensors and f"{below}0._u" in tensors and f"{below}0._v" in tensors:
        return {"_orig": f"{below}original", "_u": f"{below}0._u", "_v": f"{below}0._v"}
    for endings in (("_orig", "_mask"), ("_orig", "_u", "_v"), ("_g", "_v")):
        if all(f"{base}{ending}" in tensors for ending in endings):
            return {ending: f"{base}{ending}" for ending in endings}
    return {}


def _weight(parts: Mapping[str, torch.Tensor], model: nn.Module, base: str) -> torch.Tensor | None:
    """Compute a weight from its parts as the layer does in evaluation mode; None if their shapes do not fit."""
    if "_mask" in parts:
        return parts["_orig"] * parts["_mask"].to(parts["_orig"].dtype)
    if "_g" in parts:
        magnitude, direction = parts["_g"], parts["_v"]
        return direction * (magnitude / _norm(direction, magnitude)) if _is_norm(direction, magnitude) else None
    weight, left, right = parts["_orig"], parts["_u"], parts["_v"]
    dimension = 1 if _is_transposed(model, base) else 0
    if left.ndim != 1 or right.ndim != 1 or len(left) != weight.shape[dimension]:
        return None
    rows = weight.movedim(dimension, 0).flatten(1)
    return weight / torch.dot(left, rows @ right) if rows.shape[1] == len(right) else None


def _is_norm(direction: torch.Tensor, magnitude: torch.Tensor) -> bool:
    """Return whether a magnitude has the shape of a norm of the direction: one number, or some sides of length 1."""
    sides = zip(magnitude.shape, direction.shape, strict=False)
    return magnitude.numel() == 1 or (
        magnitude.ndim == direction.ndim and all(side in (1, full) for side, full in sides)
    )


def _norm(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the norm of a weight over the dimensions in which `like` has length 1, in the shape of `like`."""
    if like.numel() == 1:
        return weight.norm().reshape(like.shape)
    return weight.norm(dim=[place for place, side in enumerate(like.shape) if side == 1], keepdim=True)


def _is_transposed(model: nn.Module, base: str) -> bool:
    layer = dict(model.named_modules(remove_duplicate=False)).get(base.rpartition(".")[0])
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
