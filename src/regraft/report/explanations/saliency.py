"""What a network looked at: where in a photo lies what speaks for a class.

Grad-CAM takes the last map of features (N, C, h, w) and weighs its channels by the gradient of the class's score. Which
tensor is that map is not asked of the caller. One forward records what goes into and comes out of every layer; of the
tensors with the layout of a map, the last one with a gradient is taken, so that the backward is short. What goes in is
recorded as well because an edit within a block dissolves it into a graph: the block is no longer called, and the sum at
its end is seen only where the pooling takes it. In a vision transformer whose head reads the class token alone, the
last tokens with a gradient are those that the last attention takes. A network without such a map is asked again and
again, with one part of the photo covered each time.

captum 0.9 was tried and dropped: it asks for the path of the layer, which is the difficult part, and where a block was
dissolved it finds no output of it. Where it finds one, the maps are equal. grad-cam 1.5 asks the same and needs OpenCV.

Source: Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2; Zeiler and Fergus 2014,
https://arxiv.org/abs/1311.2901, for occlusion.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode, preserved_randomness
from regraft.anatomy.tracing import uncompiled, unfused_attention
from regraft.torch_internals import tree_leaves
from regraft.training.loop import main_output

MIN_SIDE = 4  # positions of a map; smaller ones say too little
OCCLUSION_SIDE = 7  # cells of the grid of `occlusion`
MAX_TRIES = 8  # maps whose gradients are computed, from the last one back
MIN_CHANGE_RATIO = 1.5  # of tokens in the changed quarter, to the others
MAX_HALVINGS = 5  # of the grid of tokens, from the first map on
MAX_PREFIX = 8  # tokens before those of the patches: class, distillation, registers


@dataclass(frozen=True)
class FeatureMap:
    """A tensor of a forward that has a value at each position of the photo.

    Attributes:
        path: Path of the layer that it came out of, or went into.
        tensor: As the network has it.
        layout: `channels first` (N, C, h, w), `channels last` (N, h, w, C) or `tokens` (N, prefix + h · w, C).
        grid: h and w.
        is_normed: Whether a norm gave it.
    """

    path: str
    tensor: torch.Tensor
    layout: str
    grid: tuple[int, int]
    is_normed: bool

    def channels_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of this layout as (N, C, h, w)."""
        if self.layout == "channels first":
            return tensor
        if self.layout == "tokens":
            height, width = self.grid
            tensor = tensor[:, -height * width :].unflatten(1, self.grid)
        return tensor.permute(0, 3, 1, 2)


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor | None:
    """Return where in each image lies what speaks for a class, by Grad-CAM.

    Parameters, gradients, modes and random state of the network are as before, also after an exception.

    Args:
        model: A network that returns scores (N, K).
        images: Preprocessed images (N, C, H, W), on the device of the network.
        classes: The class of each (N,).

    Returns:
        Maps (N, h, w), from 0 to 1 each; all 0 where nothing speaks for the class. None where the network has no map of
        features that its scores depend on.
    """
    scores, maps = _record(model, images)
    if scores.ndim != 2 or not scores.requires_grad:
        return None
    score = scores.gather(1, classes.to(scores.device)[:, None]).sum()
    for features in _candidates(maps):
        try:
            (gradient,) = torch.autograd.grad(score, features.tensor, retain_graph=True, allow_unused=True)
        except RuntimeError:  # overwritten since, or without a derivative
            continue
        if gradient is None:
            continue
        gradient = features.channels_first(gradient).float()
        if not bool(gradient.any()):  # the head reads the class token alone
            continue
        if features.layout == "tokens" and not _is_in_place(model, images, maps, features):
            return None
        weights = gradient.mean((2, 3), keepdim=True)  # equation 1
        weighted = (weights * features.channels_first(features.tensor.detach()).float()).sum(1)  # (N, h, w)
        return _scaled(weighted)
    return None


def _candidates(maps: list[FeatureMap]) -> list[FeatureMap]:
    """Return the maps to try, the best first: the last one, of tokens the last one that a norm gave."""
    large = [features for features in maps if min(features.grid) >= MIN_SIDE] or maps
    latest = large[::-1]
    if latest and latest[0].layout == "tokens":  # what is in between norms are parts of attention
        latest = [features for features in latest if features.is_normed] or latest
    return latest[:MAX_TRIES]


def _is_in_place(model: nn.Module, images: torch.Tensor, maps: list[FeatureMap], features: FeatureMap) -> bool:
    """Return whether tokens lie as the parts of the photo do: those of a quarter change most with that quarter.

    Some networks (Hiera) keep their tokens in another order, and a map of them would point anywhere.
    """
    changed, quarter = images.clone(), (..., slice(images.shape[-2] // 2), slice(images.shape[-1] // 2))
    changed[quarter] = -1 - changed[quarter]
    _, others = _record(model, changed)
    place = next(index for index, entry in enumerate(maps) if entry is features)
    if len(others) != len(maps):
        return False
    change = features.channels_first((others[place].tensor - features.tensor).detach()).abs().mean((0, 1))  # (h, w)
    height, width = (-(-side // 2) for side in features.grid)
    inside = change[:height, :width]
    outside = (change.sum() - inside.sum()) / max(change.numel() - inside.numel(), 1)
    return bool(inside.mean() > MIN_CHANGE_RATIO * outside)


def _scaled(maps: torch.Tensor) -> torch.Tensor:
    """Return the positive part of maps (N, h, w), with a maximum of 1 each."""
    positive = maps.relu()
    return positive / positive.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _record(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[FeatureMap]]:
    """Run a network with gradients; return its scores, and the maps that went into and came out of its layers."""
    maps: list[FeatureMap] = []

    def before(path: str) -> Any:
        def note(layer: nn.Module, arguments: Any, keywords: Any) -> None:
            _note_maps(maps, path, (arguments, keywords), images, is_normed=False)

        return note

    def after(path: str) -> Any:
        def note(layer: nn.Module, arguments: Any, output: Any) -> None:
            is_normed = "norm" in type(layer).__name__.lower()
            _note_maps(maps, path, output, images, is_normed=is_normed)

        return note

    handles = []
    for path, layer in model.named_modules():
        handles.append(layer.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(path)))
    try:
        with (
            preserved_randomness(),
            evaluation_mode(model),
            uncompiled(model),
            unfused_attention(),
            torch.enable_grad(),  # a network that is frozen has gradients by its input
        ):
            leaf = images.detach().requires_grad_()
            return main_output(model(leaf.clone())), maps
    finally:
        for handle in handles:
            handle.remove()


def _note_maps(maps: list[FeatureMap], path: str, value: Any, images: torch.Tensor, *, is_normed: bool) -> None:
    for tensor in tree_leaves(value):
        if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad or tensor.ndim not in (3, 4):
            continue
        if tensor.shape[0] != images.shape[0] or not tensor.is_floating_point():
            continue
        described = _layout(tensor, images, maps)
        if described is not None:
            maps.append(FeatureMap(path, tensor, *described, is_normed))


def _layout(tensor: torch.Tensor, images: torch.Tensor, maps: list[FeatureMap]) -> tuple[str, tuple[int, int]] | None:
    """Return the layout of a map and its grid; None for a tensor that is none."""
    sides = (images.shape[-2], images.shape[-1])
    first = maps[0].grid if maps else sides
    if tensor.ndim == 3:
        grids = [(-(-first[0] // 2**k), -(-first[1] // 2**k)) for k in range(MAX_HALVINGS if maps else 0)]
        fitting = (grid for grid in grids if 0 <= tensor.shape[1] - grid[0] * grid[1] <= MAX_PREFIX and min(grid) > 1)
        return next((("tokens", grid) for grid in fitting), None)
    shape = tuple(tensor.shape)
    for layout, grid in (("channels first", shape[2:]), ("channels last", shape[1:3])):
        # Of the photo's proportions, and no finer than the first map: attention has squares (N, heads, T, T) too.
        is_like = abs(grid[0] * sides[1] - grid[1] * sides[0]) <= max(sides)
        if is_like and min(grid) > 1 and grid[0] <= first[0] and grid != sides:
            return layout, (grid[0], grid[1])
    return None


def occlusion(
    model: nn.Module, images: torch.Tensor, classes: torch.Tensor, *, side: int = OCCLUSION_SIDE
) -> torch.Tensor:
    """Return where in each image lies what speaks for a class, by covering one part after another with gray.

    A window of 2 × 2 cells moves over a grid of side × side; the value of a cell is the mean fall of the class's
    log-probability in the windows over it. That is (side - 1)² forward passes for each image.

    Args:
        model: A network that returns scores (N, K).
        images: Preprocessed images (N, C, H, W), on the device of the network.
        classes: The class of each (N,).
        side: Cells of the grid along each side.

    Returns:
        Maps (N, side, side), from 0 to 1 each.
    """
    height, width = images.shape[-2:]
    rows = [round(place * height / side) for place in range(side + 1)]
    columns = [round(place * width / side) for place in range(side + 1)]
    index = classes.to(images.device)[:, None]

    def log_probability(inputs: torch.Tensor) -> torch.Tensor:  # (N,)
        return main_output(model(inputs)).float().log_softmax(1).gather(1, index).squeeze(1)

    falls = torch.zeros(len(images), side, side, device=images.device)
    counts = torch.zeros(side, side, device=images.device)
    with preserved_randomness(), evaluation_mode(model), torch.inference_mode():
        whole = log_probability(images)
        for row in range(side - 1):
            for column in range(side - 1):
                covered = images.clone()
                covered[..., rows[row] : rows[row + 2], columns[column] : columns[column + 2]] = 0  # the mean color
                falls[:, row : row + 2, column : column + 2] += (whole - log_probability(covered))[:, None, None]
                counts[row : row + 2, column : column + 2] += 1
    return _scaled(falls / counts)
