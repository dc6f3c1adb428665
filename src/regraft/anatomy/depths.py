"""How deep in a network each parameter lies, counted in blocks from the input."""

from typing import Any, cast

from torch import nn

from regraft.anatomy.heads import find_heads
from regraft.anatomy.paths import is_within
from regraft.anatomy.tracing import trace


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Return the depth of each parameter by name: 0 at the input, the largest at the head.

    timm's networks say themselves what belongs together (`group_matcher`). In all others the blocks are the top-level
    layers in execution order, and instead of a stack of blocks (`nn.Sequential`, `nn.ModuleList`) those inside of it. A
    single layer and its norm belong to one block, and the head is one of its own. A parameter outside of all layers (a
    class token) lies where it is first used; one that is never used is as deep as the head.

    Raises:
        ModelError: The network has no `group_matcher`, and its forward fails on the guessed input.
    """
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        return cast("dict[str, int]", group_parameters(model, cast(Any, matcher(coarse=False)), reverse=True))
    first_uses = trace(model).first_uses
    depths: dict[str, int] = {}
    blocks = _blocks(model)
    depth, previous = -1, None
    for name in sorted(first_uses, key=lambda name: first_uses[name]):
        block = next((path for path in blocks if is_within(name, path)), None)
        if block is None or block != previous:
            opens = depth < 0 or (block is not None and not _joins(model, block, previous))
            depth += opens
            previous = block if block is not None else previous
        depths[name] = max(depth, 0)
    heads = find_heads(model)
    in_heads = {name for name in depths if any(is_within(name, head) for head in heads)}
    if any(depths[name] == depth for name in depths.keys() - in_heads):
        depth += 1
    return {name: depth if name in in_heads else depths.get(name, depth) for name, _ in model.named_parameters()}


def _blocks(model: nn.Module, prefix: str = "") -> list[str]:
    found = []
    for name, child in model.named_children():
        if next(child.parameters(), None) is None:
            continue
        holds_blocks = _is_stack(child) or any(_is_stack(inner, alike=True) for inner in child.children())
        found += _blocks(child, f"{prefix}{name}.") if holds_blocks else [prefix + name]
    return found


def _is_stack(layer: nn.Module, *, alike: bool = False) -> bool:
    """Say whether a layer is a mere list of blocks; `alike`: of two or more of one kind, as a transformer's.

    A list of lists of single layers (convolution, norm, activation) is the inside of a block, as MobileNet has it.
    """
    if not isinstance(layer, (nn.Sequential, nn.ModuleList)):
        return False
    inner = [child for child in layer.children() if next(child.parameters(), None) is not None]
    if not alike:
        return any(list(child.children()) for child in inner)
    are_blocks = any(
        _is_stack(child) if isinstance(child, nn.Sequential) else list(child.children()) for child in inner
    )
    return are_blocks and len(inner) > 1 and len({type(child) for child in inner}) == 1


def _joins(model: nn.Module, block: str, previous: str | None) -> bool:
    """Say whether a block is a single norm that belongs to the single layer before it."""
    if previous is None:
        return False
    layers = [model.get_submodule(path) for path in (previous, block)]
    return not any(list(layer.children()) for layer in layers) and "norm" in type(layers[1]).__name__.lower()
