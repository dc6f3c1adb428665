"""The network as a drawing: its blocks in the order of execution, what each holds and costs, and what was trained."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.paths import is_within
from regraft.anatomy.summary_table import ModelSummary
from regraft.errors import RegraftError

MAX_BLOCKS = 24  # rows; of more, neighbours in the same state are drawn as one
MAX_NAMES = 2  # layers that name a block which is not one layer

BlockState = Literal["frozen", "partly frozen", "trainable", "head"]


@dataclass(frozen=True)
class Block:
    """A row of the drawing.

    Attributes:
        name: Path of the layer, or paths of the layers.
        state: `frozen`, `partly frozen`, `trainable`, or `head` for a trained head.
        parameters: Number of parameters.
        parameter_share: Share of the network's parameters.
        cost_share: Share of the network's multiply-adds; None where unknown.
    """

    name: str
    state: BlockState
    parameters: int
    parameter_share: float
    cost_share: float | None


def describe_blocks(model: nn.Module, model_summary: ModelSummary) -> list[Block]:
    """Return the blocks of a network, in the order of execution; nothing where its structure cannot be worked out.

    Args:
        model: The network.
        model_summary: Its summary, from which the costs are taken.
    """
    facts = ModelFacts(model)
    try:
        depths, in_head = facts.depths, facts.head_parameters
    except RegraftError:
        return []
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    by_depth: dict[int, list[str]] = {}
    for name in parameters:
        by_depth.setdefault(depths[name], []).append(name)
    costs = _costs(model_summary, by_depth)
    blocks = []
    for depth in sorted(by_depth):
        names = by_depth[depth]
        size = sum(parameters[name].numel() for name in names)
        trainable = [parameters[name].requires_grad for name in names]
        state: BlockState = "trainable" if all(trainable) else "partly frozen" if any(trainable) else "frozen"
        if state == "trainable" and in_head.issuperset(names):
            state = "head"
        blocks.append(Block(_name(names), state, size, size / max(total, 1), costs.get(depth)))
    return _merged(blocks)


def _costs(model_summary: ModelSummary, by_depth: dict[int, list[str]]) -> dict[int, float]:
    """Return the share of the multiply-adds of each block: those of its layers that call no other layer."""
    total = model_summary.layers[0].multiply_adds
    if not total:
        return {}
    around = {layer.path.rpartition(".")[0] for layer in model_summary.layers if layer.path}
    inner = {layer.path: layer.multiply_adds or 0 for layer in model_summary.layers if layer.path not in around}
    owners = {name.rpartition(".")[0]: depth for depth, names in by_depth.items() for name in names}
    costs = dict.fromkeys(by_depth, 0.0)
    for path, operations in inner.items():
        owner = path if path in owners else next((other for other in owners if is_within(path, other)), None)
        if owner is not None:
            costs[owners[owner]] += operations / total
    return costs


def _name(parameters: Sequence[str]) -> str:
    """Return the layer that holds all these parameters, or the first of several.

    >>> _name(["layer1.0.conv1.weight", "layer1.0.bn1.weight"]), _name(["conv1.weight", "bn1.weight", "bn1.bias"])
    ('layer1.0', 'conv1, bn1')
    """
    by_child: dict[str, list[list[str]]] = {}
    for name in parameters:
        owner = name.split(".")[:-1] or [name]
        by_child.setdefault(owner[0], []).append(owner)
    names = [".".join(_shared_parts(owners)) for owners in by_child.values()]
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


def _shared_parts(paths: Sequence[Sequence[str]]) -> list[str]:
    columns = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in columns]


def _merged(blocks: list[Block]) -> list[Block]:
    """Draw neighbours in the same state as one, where there are too many blocks."""
    size = -(-len(blocks) // MAX_BLOCKS)
    merged: list[Block] = []
    counts: list[int] = []
    for block in blocks:
        if merged and block.state == merged[-1].state and counts[-1] < size:
            first = merged.pop()
            costs = [share for share in (first.cost_share, block.cost_share) if share is not None]
            name = f"{first.name.partition(' to ')[0]} to {block.name}"
            size_of_both = first.parameters + block.parameters
            share = first.parameter_share + block.parameter_share
            merged.append(Block(name, block.state, size_of_both, share, sum(costs) if costs else None))
            counts[-1] += 1
        else:
            merged.append(block)
            counts.append(1)
    return merged
