"""The depth of each parameter in a network, counted in blocks from the input, for layer-wise learning-rate decay."""

import contextlib
from collections.abc import Collection
from typing import Any, cast

from torch import nn

from regraft.anatomy.heads import describe_heads
from regraft.anatomy.paths import is_within
from regraft.anatomy.tracing import LazyTrace
from regraft.anatomy.wrappers import sole_child, unwrapped
from regraft.errors import ModelError


def parameter_depths(run: LazyTrace) -> dict[str, int]:
    """Return the depth of each parameter by name: 0 at the input, the largest at the head.

    timm's networks define their blocks (`group_matcher`), also where they lie inside of another module. In all others
    the blocks are the top-level layers in execution order; a stack of blocks (`nn.Sequential`, `nn.ModuleList`), and a
    layer that holds one at any depth, are replaced by the blocks inside. A norm belongs to the block before it, tables
    of embeddings that follow each other are one block, and the head is a block of its own. A parameter outside of all
    layers (a class token) has the depth of its first use, a tied one that of its first name; one that is never used is
    as deep as the head. A module that holds nothing but one network (`DataParallel`, a wrapper class of the user's own)
    has the depths of that network. Where the forward fails, layers count in the order of registration, as in timm.
    """
    model = run.model
    groups = _timm_groups(model)
    if groups is not None:
        return groups
    inside = unwrapped(model)[0] or sole_child(model)
    if inside and any(True for _ in model.get_submodule(inside).children()):
        with contextlib.suppress(ModelError):  # a list of layers, or one that takes what the module around it prepares
            depths = parameter_depths(LazyTrace(model.get_submodule(inside)))
            return {f"{inside}.{name}": depth for name, depth in depths.items()}
    # Registration order may differ from execution order, so blocks are sorted by the first use of their parameters.
    first_uses = _first_uses(run)
    parts = {path: _timm_groups(layer) for path, layer in model.named_children()}
    blocks = _blocks(model, skipped={path for path, part in parts.items() if part is not None})
    begins = {
        path: min((moment for name, moment in first_uses.items() if is_within(name, path)), default=0)
        for path, part in parts.items()
        if part is not None
    }
    # By parameter: first use, depth within a part of timm's, and block. Parameters of such a part share its first use:
    # they stay together, and inside of the part timm's own rule sorts them.
    places: dict[str, tuple[int, int, str | None]] = {}
    for name, moment in first_uses.items():
        part = next((path for path in begins if is_within(name, path)), None)
        if part is not None:
            depth_within = (parts[part] or {})[name.removeprefix(f"{part}.")]
            places[name] = (begins[part], depth_within, f"{part}:{depth_within}")
        else:
            places[name] = (moment, 0, next((path for path in blocks if is_within(name, path)), None))
    depths: dict[str, int] = {}
    depth, previous = -1, None  # -1: no block has begun
    for name in sorted(places, key=lambda name: places[name][:2]):
        block = places[name][2]
        if block is None or block != previous:
            # A parameter outside of all blocks begins none: it takes the current depth.
            depth += block is not None and not _joins(model, block, previous)
            previous = block if block is not None else previous
        depths[name] = max(depth, 0)
    depth = max(depth, 0)
    # The head gets a depth of its own, also where it lies in the last block, as in a Sequential of features and head.
    heads = describe_heads(run)
    in_heads = {name for name in depths if any(is_within(name, head.path) for head in heads)}
    if any(depths[name] == depth for name in depths.keys() - in_heads):
        depth += 1
    return {name: depth if name in in_heads else depths.get(name, depth) for name, _ in model.named_parameters()}


def _first_uses(run: LazyTrace) -> dict[str, int]:
    """Return the moment of the first use of each parameter, by the first of its names; by registration if it fails."""
    names = [name for name, _ in run.model.named_parameters()]
    try:
        uses = run.read().first_uses
    except ModelError:
        return {name: moment for moment, name in enumerate(names)}
    return {name: uses[name] for name in names if name in uses}


def _timm_groups(model: nn.Module) -> dict[str, int] | None:
    """Return the depths that timm's own rule gives its networks; None for all others."""
    if not callable(getattr(type(model), "group_matcher", None)):  # on the class: wrappers forward instance attributes
        return None
    from timm.models import group_parameters

    matcher = cast(Any, model).group_matcher(coarse=False)
    return cast("dict[str, int]", group_parameters(model, matcher, reverse=True))


def _blocks(model: nn.Module, prefix: str = "", skipped: Collection[str] = (), stacks: int = 0) -> list[str]:
    """Return the paths of the blocks with parameters, in registration order.

    Args:
        model: The layer to look into.
        prefix: Its path and a dot.
        skipped: Names of its children to leave out.
        stacks: Number of stacks that it lies in. In a stack of a stack (stages of blocks), units of single layers
            (convolution, norm, activation) are the inside of a block, as in the residual networks of transformers.
    """
    blocks = []
    for name, child in model.named_children():
        if name in skipped or next(child.parameters(), None) is None:
            continue
        is_inside = stacks > 1 and not any(_is_stack(inner, alike=True, deep=True) for inner in child.modules())
        holds_blocks = _is_stack(child) or any(_is_stack(inner, alike=True) for inner in child.modules())
        inner_stacks = stacks + _is_stack(child)
        blocks += (
            _blocks(child, f"{prefix}{name}.", stacks=inner_stacks)
            if holds_blocks and not is_inside
            else [prefix + name]
        )
    return blocks


def _is_stack(layer: nn.Module, *, alike: bool = False, deep: bool = False) -> bool:
    """Return whether a layer is a stack of blocks.

    A list of lists of single layers (convolution, norm, activation) is the inside of a block, as in MobileNet.

    Args:
        layer: Any layer.
        alike: Whether it must be of two or more blocks of one class, as in a transformer.
        deep: Whether these must hold more than single layers.
    """
    if not isinstance(layer, (nn.Sequential, nn.ModuleList)):
        return False
    inner = [child for child in layer.children() if next(child.parameters(), None) is not None]
    if not alike:
        return any(list(child.children()) for child in inner)
    are_blocks = any(
        _is_stack(child) if isinstance(child, nn.Sequential) else list(child.children()) for child in inner
    )
    if deep and not any(list(part.children()) for child in inner for part in child.children()):
        return False
    return are_blocks and len(inner) > 1 and len({type(child) for child in inner}) == 1


def _joins(model: nn.Module, block: str, previous: str | None) -> bool:
    """Return whether a block is a single norm, or a table of embeddings after another one."""
    layers = dict(model.named_modules())
    if previous not in layers or block not in layers or list(layers[block].children()):
        return False
    tables = (nn.Embedding, nn.EmbeddingBag)
    is_next_table = isinstance(layers[block], tables) and isinstance(layers[previous], tables)
    return is_next_table or "norm" in type(layers[block]).__name__.lower()
