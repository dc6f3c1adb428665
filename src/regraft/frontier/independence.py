"""Find by running it what in the constant part is not constant, whatever its flags and its graph look like.

What an image gives may depend on a random state that nothing declares, on how often the network was called, or on the
other images of its batch (statistics over the batch, differences from its mean, attention across it, an order that is
turned around). Every value of the graph is computed for two batches of random inputs, on copies of the buffers and from
different random states; the batches are of different sizes, and one image lies in both, at different places. Where what
that image gives differs, the value is live: it is computed anew in every epoch, for the batch that is there. Only then
the first batch is run once more, to tell a value that draws from one that mixes.

Values whose rows are not images (windows, shapes without a batch) are not compared themselves, as what is computed
from them is, before it can be kept.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from regraft.anatomy.dataflow.graph import Flow
from regraft.anatomy.dataflow.values import BATCHES, Interpreter
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.mode_dependence import is_pinned
from regraft.anatomy.modes import preserved_randomness, seed_all
from regraft.anatomy.recording import ParameterWatch
from regraft.anatomy.shape_copies import aliased_copy

PLACES = (0, 2)  # where the image that both batches hold lies in each
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the largest
IS_RANDOM = "draws at random or counts its calls"
IS_MIXED = "mixes the images of a batch"


def dependent_values(model: nn.Module, flow: Flow, nodes: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Return which of some values depend on more than the image, and how; not those that depend on these.

    Args:
        model: On its device. Nothing of it is changed.
        flow: Its dataflow while it trains, with an example of its inputs.
        nodes: The values that are constant by the flags.
    """
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta or nn.parameter.is_lazy(tensor) for tensor in tensors):
        return {}  # there is nothing to run
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with preserved_randomness(0), torch.no_grad():
        inputs = Arguments(flow.inputs)
        first, other = with_image_of(*(inputs.drawn(count, device) for count in BATCHES))
        duplicate = _training_copy(model, flow)
        watch = ParameterWatch()
        watch.protect(model.parameters())
        with watch:
            dependent = _compared(duplicate, flow, nodes, (first.args, other.args))
            if dependent:
                drawn = _compared(duplicate, flow, nodes, (first.args, first.args))
                dependent |= {node: IS_RANDOM for node in dependent if node in drawn}
            return dependent


def _compared(
    duplicate: nn.Module, flow: Flow, nodes: Collection[fx.Node], batches: tuple[tuple[Any, ...], tuple[Any, ...]]
) -> dict[fx.Node, str]:
    """Compute value after value for two batches, which may be the same; see `dependent_values`."""
    is_repeated = batches[0] is batches[1]
    runs = [Interpreter(duplicate, flow.graph) for _ in batches]
    dependent: dict[fx.Node, str] = {}
    unknown: set[fx.Node] = set()
    placeholders = [node for node in flow.graph.nodes if node.op == "placeholder"]
    last_use = {source: node for node in flow.graph.nodes if node in nodes for source in node.all_input_nodes}
    for number, node in enumerate(flow.graph.nodes):
        sources = node.all_input_nodes
        if node not in nodes or any(source in dependent or source in unknown for source in sources):
            unknown.add(node)
            continue
        for seed, (run, batch) in enumerate(zip(runs, batches, strict=True)):
            if node.op == "placeholder":
                run.env[node] = tree_unflatten(*_cloned(batch[placeholders.index(node)]))
                continue
            seed_all(2 * number + seed)
            try:
                run.env[node] = run.run_node(node)
            except Exception:  # it does not run on random numbers, or would write to weights
                unknown.add(node)
                break
        else:
            one, another = (run.env[node] for run in runs)
            problem = difference(one, another, one) if is_repeated else difference(one, one, another)
            if problem is not None and node.op != "placeholder":
                dependent[node] = problem
        for source in sources:
            if last_use.get(source) is node:
                for run in runs:
                    run.env.pop(source, None)
    return dependent


def difference(value: Any, again: Any, other: Any) -> str | None:
    """Return how what a batch gives differs from what it gives again, or its image from the same in another batch.

    The batches are of `BATCHES` images, see `with_image_of`. None where nothing differs.
    """
    leaves = [tree_leaves(one) for one in (value, again, other)]
    if len({len(one) for one in leaves}) > 1:
        return IS_RANDOM if len(leaves[0]) != len(leaves[1]) else IS_MIXED
    for one, same, another in zip(*leaves, strict=True):
        if not isinstance(one, torch.Tensor):
            if isinstance(one, (bool, int, float, str)) and one != same:
                return IS_RANDOM
            continue
        if one.shape != same.shape or not _is_close(one, same, is_exact=one.device.type == "cpu"):
            return IS_RANDOM
        rows = _image(one, another)
        if rows is not None and not _is_close(*rows, is_exact=False):
            return IS_MIXED
    return None


def with_image_of(first: Arguments, other: Arguments) -> tuple[Arguments, Arguments]:
    """Put the first image of a batch into another batch, at another place."""
    ours, _ = tree_flatten((first.args, first.kwargs))
    others, structure = tree_flatten((other.args, other.kwargs))
    for one, another in zip(ours, others, strict=True):
        if isinstance(one, torch.Tensor) and one.ndim and (len(one), len(another)) == BATCHES:
            another[PLACES[1]] = one[PLACES[0]]
    return first, Arguments(*tree_unflatten(others, structure))


def _image(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what the image that is in both batches gives, by the dimension that is that of images."""
    if not isinstance(other, torch.Tensor) or one.ndim != other.ndim:
        return None
    for dimension, sizes in enumerate(zip(one.shape, other.shape, strict=True)):
        if sizes == BATCHES:
            return one.select(dimension, PLACES[0]), other.select(dimension, PLACES[1])
    return None


def _is_close(a: torch.Tensor, b: torch.Tensor, *, is_exact: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() and not a.is_complex():
        return False
    share = 0.0 if is_exact else TOLERANCES.get(a.dtype, 1e-4) * (10 if a.is_cuda else 1)
    largest, distance = (float(torch.linalg.vector_norm(value, float("inf"))) for value in (a, a - b))
    if math.isfinite(largest) and math.isfinite(distance):
        return distance <= share * largest
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=share * largest, equal_nan=True))


def _cloned(value: Any) -> tuple[list[Any], Any]:
    leaves, structure = tree_flatten(value)
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure


def _training_copy(model: nn.Module, flow: Flow) -> nn.Module:
    """Copy a network as it is while it trains; parameters share its memory."""
    duplicate = aliased_copy(model)
    duplicate.train()
    for path, layer in model.named_modules():
        if is_pinned(layer):
            duplicate.get_submodule(path).training = False
    for name, tensor in flow.constants.items():
        setattr(duplicate, name, tensor.clone())
    return duplicate
