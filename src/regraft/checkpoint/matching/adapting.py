"""Adapt tensors of a file to the shapes of a model: position embeddings, the first convolution, rows of classes."""

import math
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from regraft.anatomy.heads import CONVOLUTIONS
from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.paths import is_within
from regraft.checkpoint.foreign.state_dicts import Tensors
from regraft.checkpoint.matching.load_report import Adaptation
from regraft.errors import RegraftError
from regraft.surgery.stem import filters_for

Adaptable = Literal["positions", "stem", "head"]

POSITIONS = re.compile(r"(^|[._])(abs_?)?pos(ition(al|s)?)?_(embed|enc)")
TOKENS = re.compile(r"(^|\.)(cls_token|class_token|dist_token|distillation_token|reg_token|class_embedding)$")
STANDARD = ("torch.nn.modules.conv", "timm.layers.conv2d_same")  # whose outputs are linear in their filters


class Fitter:
    """Adapts tensors to one model, whose heads and stem are worked out when one of them is first asked for.

    Args:
        model: The model; it is not changed.
        slots: Its tensors by name.
        held: The tensors of the file, under their names in the model.
        kinds: What may be adapted.
    """

    def __init__(self, model: nn.Module, slots: Tensors, held: Tensors, kinds: Collection[Adaptable]) -> None:
        self._model, self._slots, self._held, self._kinds = model, slots, held, kinds
        self._facts = ModelFacts(model)

    def fit(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, Adaptation] | None:
        """Return a tensor of the shape of the model's `name`, and what was done; None where no adaptation applies.

        Shapes that differ only in dimensions of length 1 are always reshaped, as they hold the same numbers.
        """
        slot = self._slots[name]
        text = f"{shape(tensor)} → {shape(slot)}"
        if [side for side in tensor.shape if side != 1] == [side for side in slot.shape if side != 1]:
            return tensor.reshape(slot.shape), Adaptation(name, "reshape", f"reshaped, {text}")
        if "positions" in self._kinds and POSITIONS.search(name):
            adapted = self._resampled(name, tensor)
            if adapted is not None:
                return adapted, Adaptation(name, "positions", f"positions resampled (bicubic), {text}")
        if "stem" in self._kinds and self._is_stem(name, tensor):
            return _other_channels(tensor, slot.shape[1]), Adaptation(
                name, "stem", f"filters for {tensor.shape[1]} channels made to take {slot.shape[1]}, {text}"
            )
        if "head" in self._kinds and self.is_other_head(name, tensor):
            rows = min(len(tensor), len(slot))
            adapted = slot.detach().cpu().to(tensor.dtype).clone()
            adapted[:rows] = tensor[:rows]
            rest = f"; the other {len(slot) - rows} keep their values" if len(slot) > rows else ""
            return adapted, Adaptation(name, "head", f"the first {rows} classes taken{rest}, {text}")
        return None

    def is_other_head(self, name: str, tensor: torch.Tensor) -> bool:
        """Return whether `name` belongs to a classifier, and differs from the file's in the number of classes alone."""
        slot = self._slots[name]
        is_alike = tensor.ndim == slot.ndim > 0 and tensor.shape[1:] == slot.shape[1:]
        return is_alike and self.is_in_output(name)

    def is_in_output(self, name: str) -> bool:
        """Return whether `name` belongs to the layer that outputs the classes: the last one of a head."""
        head = next((head for head in self._heads if is_within(name, head)), None)
        if head is None:
            return False
        last = [slot for slot in self._slots if is_within(slot, head)][-1]
        return name.rpartition(".")[0] == last.rpartition(".")[0]

    def is_in_head(self, name: str) -> bool:
        """Return whether `name` belongs to a classifier of the model."""
        return any(is_within(name, head) for head in self._heads)

    @cached_property
    def _heads(self) -> list[str]:
        try:
            heads = [head.path for head in self._facts.heads]
            return [*heads, *self._facts.auxiliary_heads(heads)]
        except RegraftError:
            return []

    @cached_property
    def _stem(self) -> str:
        try:
            return self._facts.first_convolution
        except RegraftError:
            return ""

    def _is_stem(self, name: str, tensor: torch.Tensor) -> bool:
        slot = self._slots[name]
        others = [position for position in range(slot.ndim) if position != 1]
        if tensor.ndim != slot.ndim or slot.ndim < 3 or any(tensor.shape[i] != slot.shape[i] for i in others):
            return False
        if not self._stem or name != f"{self._stem}.weight":
            return False
        layer = self._model.get_submodule(self._stem)
        return isinstance(layer, CONVOLUTIONS) and layer.groups == 1 and type(layer).__module__ in STANDARD

    def _resampled(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Resample absolute position embeddings (1, T, D), (T, D) or (1, H, W, D); those of class tokens are kept.

        None where the grid is not square or not known, or the file has another number of class tokens.
        """
        from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc

        slot = self._slots[name]
        if tensor.ndim != slot.ndim or tensor.shape[-1] != slot.shape[-1] or not tensor.is_floating_point():
            return None
        if slot.ndim == 4 and len(tensor) == len(slot) == 1:
            return resample_abs_pos_embed_nhwc(tensor, [slot.shape[1], slot.shape[2]])
        if slot.ndim not in (2, 3) or (slot.ndim == 3 and not len(tensor) == len(slot) == 1):
            return None
        kept, grid = self._tokens_and_grid(name, slot.shape[-2])
        if grid is None or (_count_class_tokens(self._held) != _count_class_tokens(self._slots)):
            return None
        if _square_side(tensor.shape[-2] - kept) is None:
            return None
        resampled = resample_abs_pos_embed(tensor.reshape(1, *tensor.shape[-2:]), list(grid), num_prefix_tokens=kept)
        return resampled.reshape(slot.shape)

    def _tokens_and_grid(self, name: str, length: int) -> tuple[int, tuple[int, int] | None]:
        """Return how many of the model's `length` positions belong to class tokens, and (rows, columns) of the others.

        The layer's own attributes are trusted first; without them, a square grid is assumed, with class tokens or
        without.
        """
        owner: Any = self._model.get_submodule(name.rpartition(".")[0])
        grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
        if grid is not None and isinstance(getattr(owner, "num_prefix_tokens", None), int):
            kept = 0 if getattr(owner, "no_embed_class", False) else owner.num_prefix_tokens
            return (kept, (grid[0], grid[1])) if kept + grid[0] * grid[1] == length else (0, None)
        for kept in dict.fromkeys((_count_class_tokens(self._slots), 0)):
            if (side := _square_side(length - kept)) is not None:
                return kept, (side, side)
        return 0, None


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a shape as a tuple of integers."""
    return tuple(tensor.shape)


def _count_class_tokens(tensors: Mapping[str, torch.Tensor]) -> int:
    """Count the class, distillation and register tokens among some tensors."""
    class_tokens = [tensor for name, tensor in tensors.items() if TOKENS.search(name)]
    return sum(tensor.shape[-2] if tensor.ndim > 1 else 1 for tensor in class_tokens)


def _square_side(count: int) -> int | None:
    """Return the side of a square grid of `count` positions; None where it is not square."""
    side = math.isqrt(count) if count > 0 else 0
    return side if side and side * side == count else None


def _other_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Return filters (out, in, …) for another number of channels.

    Filters for gray images are repeated and divided by the number of channels, so that a gray image in all channels
    gives the same output. All others are converted as `replace_stem` does it.
    """
    if weight.shape[1] == 1:
        return weight.repeat(1, channels, *[1] * (weight.ndim - 2)) / channels
    return filters_for(weight, channels)
