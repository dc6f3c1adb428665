"""The depths from which a network can be trained: the boundaries between its blocks, in the order of execution."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.recording import Call
from regraft.errors import EditError, ModelError, SelectionError
from regraft.freezing.patterns import select

MAX_DEPTHS = 6  # that are compared, unless layers are named; the deepest and the shallowest are always among them


@dataclass(frozen=True)
class BlockBoundary:
    """A place between two blocks, where the frozen part of a network may end.

    Attributes:
        layer: Path of the last layer of the frozen part: what `freeze_until` takes.
        trained: Names of the parameters that are used after it; shared ones by all of their names.
        position: How many of the network's blocks lie before it.
    """

    layer: str
    trained: frozenset[str]
    position: int


def list_boundaries(facts: ModelFacts, layers: Sequence[str] | None = None) -> list[BlockBoundary]:
    """List the boundaries between the blocks of a network, from the input to the head.

    A boundary is the last layer that ends before the next block begins, as `parameter_depths` counts blocks. The last
    one lies before the head.

    Args:
        facts: The network.
        layers: Paths of layers after which alone the frozen part may end, beside the last boundary; None: at most
            `MAX_DEPTHS - 1` boundaries, evenly spaced.

    Returns:
        The boundaries; none where the forward cannot be recorded, or has no block before its head.

    Raises:
        SelectionError: One of `layers` does not exist, or no parameter is used before or after it.
    """
    try:
        trace = facts.trace
        heads = facts.head_parameters
        depths = facts.depths
    except (ModelError, EditError):
        return []
    uses = {name: moment for name, moment in trace.first_uses.items() if name in depths}
    begins: dict[int, int] = {}
    for name, moment in uses.items():
        depth = max(depths.values()) + 1 if name in heads else depths[name]
        begins[depth] = min(moment, begins.get(depth, moment))
    moments = sorted(begins.values())
    names = frozenset(name for name, _ in facts.model.named_parameters(remove_duplicate=False))
    boundaries: list[BlockBoundary] = []
    for position, (begin, following) in enumerate(itertools.pairwise(moments), 1):
        inside = [call for call in trace.calls if call.path and begin < call.ended <= following]
        last = max(inside, key=lambda call: call.ended, default=None)
        if last is not None:
            boundaries.append(_boundary(last, trace.first_uses, names, position))
    if not boundaries:
        return []
    if layers is None:
        return _thinned(boundaries, MAX_DEPTHS - 1)
    chosen = [_named(facts, path, trace.calls, trace.first_uses, names, moments) for path in layers]
    by_trained = {boundary.trained: boundary for boundary in (*chosen, boundaries[-1])}
    return sorted(by_trained.values(), key=lambda boundary: -len(boundary.trained))


def _boundary(call: Call, uses: dict[str, int], names: frozenset[str], position: int) -> BlockBoundary:
    return BlockBoundary(call.path, names - {name for name, moment in uses.items() if moment < call.ended}, position)


def _named(
    facts: ModelFacts,
    layer: str,
    calls: Sequence[Call],
    uses: dict[str, int],
    names: frozenset[str],
    moments: Sequence[int],
) -> BlockBoundary:
    paths = set(select(facts.model, layer))
    matching = [call for call in calls if call.path in paths]
    last = max(matching, key=lambda call: call.ended, default=None)
    boundary = None if last is None else _boundary(last, uses, names, sum(begin < last.ended for begin in moments))
    if boundary is None or not boundary.trained or boundary.trained == names:
        raise SelectionError(
            f"layer '{layer}' of {type(facts.model).__name__} cannot be the last frozen one: no parameter is used "
            f"{'before' if boundary is None or boundary.trained else 'after'} it. Name another layer."
        )
    return boundary


def _thinned(boundaries: list[BlockBoundary], count: int) -> list[BlockBoundary]:
    """Return at most so many of the boundaries, evenly spaced, the last one among them."""
    if len(boundaries) <= count:
        return boundaries
    total = len(boundaries)
    return [boundaries[round(total * number / count) - 1] for number in range(1, count + 1)]
