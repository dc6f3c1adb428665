"""Run the constant part on random inputs, to find values that are not constant although nothing declares it.

The value of an image may depend on an undeclared random state, on the number of earlier calls, or on the other images
of its batch (batch statistics, differences from the batch mean, attention across the batch, a reversed order). Every
value of the graph is computed for two batches of random inputs, on copies of the buffers and from different random
states. The batches differ in size and share one image, at different positions. Where the values of that image differ,
the value is live: it is computed in every epoch, for the current batch. Only then the first batch is run a second time,
to tell values that are random from values that mix images.

Values whose rows are not images (windows, shapes without a batch) are not compared themselves: the values that are
computed from them are compared before they can be cached.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.dataflow.graph import Flow
from regraft.anatomy.dataflow.values import BATCHES, Interpreter
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.mode_dependence import is_pinned
from regraft.anatomy.modes import preserved_randomness, seed_all
from regraft.anatomy.recording import ParameterWatch
from regraft.anatomy.shape_copies import aliased_copy
from regraft.torch_internals import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

PLACES = (0, 2)  # positions of the shared image in the two batches
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}  # shares of the largest absolute value
IS_RANDOM = "draws at random or counts its calls"
MIXES_IMAGES = "mixes the images of a batch"


def dependent_values(model: nn.Module, flow: Flow, nodes: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Return the values that depend on more than the image, with the reason; without those computed from them.

    Args:
        model: The network, on its device. It is not changed.
        flow: Its dataflow in training mode, with an example of its inputs.
        nodes: The values that are constant according to the flags.
    """
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta or nn.parameter.is_lazy(tensor) for tensor in tensors):
        return {}  # without values there is nothing to run
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with preserved_randomness(0), torch.no_grad():
        inputs = Arguments(flow.inputs)
        first, other = with_image_of(*(inputs.drawn(count, device) for count in BATCHES))
        duplicate = _training_copy(model, flow)
        watch = ParameterWatch()
        watch.protect(model.parameters())
        with watch:
            dependent = _compare_batches(duplicate, flow, nodes, (first.args, other.args))
            if dependent:  # the same batch twice: values that differ even so are random
                drawn = _compare_batches(duplicate, flow, nodes, (first.args, first.args))
                dependent |= {node: IS_RANDOM for node in dependent if node in drawn}
            return dependent


def _compare_batches(
    duplicate: nn.Module, flow: Flow, nodes: Collection[fx.Node], batches: tuple[tuple[Any, ...], tuple[Any, ...]]
) -> dict[fx.Node, str]:
    """Compute the values one after the other for two batches, which may be the same; see `dependent_values`."""
    is_repeated = batches[0] is batches[1]
    runs = [Interpreter(duplicate, flow.graph) for _ in batches]
    dependent: dict[fx.Node, str] = {}
    unknown: set[fx.Node] = set()  # not computed, as they are live, depend on live values, or fail
    placeholders = [node for node in flow.graph.nodes if node.op == "placeholder"]
    last_use = {source: node for node in flow.graph.nodes if node in nodes for source in node.all_input_nodes}
    for number, node in enumerate(flow.graph.nodes):
        sources = node.all_input_nodes
        if node not in nodes or any(source in dependent or source in unknown for source in sources):
            unknown.add(node)
            continue
        for seed, (run, batch) in enumerate(zip(runs, batches, strict=True)):
            if node.op == "placeholder":
                run.env[node] = tree_map_only(torch.Tensor, torch.clone, batch[placeholders.index(node)])
                continue
            seed_all(2 * number + seed)
            try:
                run.env[node] = run.run_node(node)
            except Exception:  # it fails on random inputs, or would write to the weights
                unknown.add(node)
                break
        else:
            first_value, second_value = (run.env[node] for run in runs)
            problem = (
                difference(first_value, second_value, first_value)
                if is_repeated
                else difference(first_value, first_value, second_value)
            )
            if problem is not None and node.op != "placeholder":
                dependent[node] = problem
        for source in sources:  # free what no later value reads
            if last_use.get(source) is node:
                for run in runs:
                    run.env.pop(source, None)
    return dependent


def difference(value: Any, repeated: Any, other: Any) -> str | None:
    """Return why a value is not constant: it differs when it is repeated, or for the same image in another batch.

    Args:
        value: The value for the first batch of `BATCHES`.
        repeated: The same, computed once more.
        other: The value for the second batch, which shares an image with the first (see `with_image_of`).

    Returns:
        `IS_RANDOM` or `MIXES_IMAGES`; None where nothing differs.
    """
    leaves = [tree_leaves(tree) for tree in (value, repeated, other)]
    if len({len(part) for part in leaves}) > 1:
        return IS_RANDOM if len(leaves[0]) != len(leaves[1]) else MIXES_IMAGES
    for tensor, same, other_tensor in zip(*leaves, strict=True):
        if not isinstance(tensor, torch.Tensor):
            if isinstance(tensor, (bool, int, float, str)) and tensor != same:
                return IS_RANDOM
            continue
        if tensor.shape != same.shape or not _is_close(tensor, same, is_exact=tensor.device.type == "cpu"):
            return IS_RANDOM
        rows = _image(tensor, other_tensor)
        if rows is not None and not _is_close(*rows, is_exact=False):
            return MIXES_IMAGES
    return None


def with_image_of(first: Arguments, other: Arguments) -> tuple[Arguments, Arguments]:
    """Copy the first image of a batch into another batch, at another position."""
    leaves, _ = tree_flatten((first.args, first.kwargs))
    other_leaves, structure = tree_flatten((other.args, other.kwargs))
    for source, target in zip(leaves, other_leaves, strict=True):
        if isinstance(source, torch.Tensor) and source.ndim and (len(source), len(target)) == BATCHES:
            target[PLACES[1]] = source[PLACES[0]]
    return first, Arguments(*tree_unflatten(other_leaves, structure))


def _image(first: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the values of the shared image in both batches; None where no dimension is that of images."""
    if not isinstance(other, torch.Tensor) or first.ndim != other.ndim:
        return None
    for dimension, sizes in enumerate(zip(first.shape, other.shape, strict=True)):
        if sizes == BATCHES:
            return first.select(dimension, PLACES[0]), other.select(dimension, PLACES[1])
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
    # Infinite values must agree exactly; the tolerance is a share of the largest finite value.
    finite = a[a.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=share * largest, equal_nan=True))


def _training_copy(model: nn.Module, flow: Flow) -> nn.Module:
    """Copy a network in training mode, with pinned layers in evaluation; the parameters share its memory."""
    duplicate = aliased_copy(model)
    duplicate.train()
    for path, layer in model.named_modules():
        if is_pinned(layer):
            duplicate.get_submodule(path).training = False
    for name, tensor in flow.constants.items():
        setattr(duplicate, name, tensor.clone())
    return duplicate
