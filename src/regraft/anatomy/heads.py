"""Find the two ends of a network: its heads and its first convolution."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.origins import Origin
from regraft.anatomy.paths import is_within
from regraft.anatomy.recording import Trace
from regraft.anatomy.tracing import LazyTrace
from regraft.anatomy.wrappers import sole_child, unwrapped
from regraft.errors import EditError, ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDE = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.MultiheadAttention, _ConvNd)
PARAMETRIZATIONS = ".parametrizations."  # between a layer's path and where torch keeps what its weights are made from
BASE_LAYER = "base_layer"  # the name under which adapters (peft) keep the layer that they wrap


@dataclass(frozen=True)
class Head:
    """A layer that gives an output of the network.

    Attributes:
        path: Path of the layer; for a parameter that a larger module multiplies with itself, the parameter's name.
        outputs: Names and shapes of the outputs that it gives, as in `("['aux']", (1, 21, 224, 224))`.
        after: Names of the parameters that take part after it: norms and scales.
    """

    path: str
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    after: tuple[str, ...] = ()


def find_heads(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Return the paths of the heads of `model`: the last layers that mix features on the way to its outputs.

    One for most networks; several where outputs are averaged or where there are several. See `describe_heads`.

    Raises:
        EditError: No layer has parameters.
    """
    return [head.path for head in describe_heads(LazyTrace(model, inputs))]


def describe_heads(run: LazyTrace) -> list[Head]:
    """Return the heads of a network with what they give, in the order of execution.

    A head is where an output originates (see `origins`), at any depth and inside any wrapper: a layer, or the name of a
    bare parameter. timm's networks name theirs. Where the forward cannot run on the guessed inputs, it is the head of
    the one network inside, or else the layer that is registered last.

    Raises:
        EditError: No layer has parameters.
    """
    model = run.model
    has_layers = any(path and any(True for _ in layer.parameters(False)) for path, layer in model.named_modules())
    if not has_layers and (_is_builtin(model) or not any(True for _ in model.parameters())):
        raise EditError(f"{type(model).__name__} has no layer with parameters, so it has no head to replace.")
    prefix, network = unwrapped(model)
    if prefix:
        return [_moved(head, prefix) for head in describe_heads(LazyTrace(network, run.inputs))]
    try:
        traced = run.read()
    except ModelError:
        child = sole_child(model)
        if child is not None and list(model.get_submodule(child).children()):
            return [_moved(head, child) for head in describe_heads(LazyTrace(model.get_submodule(child)))]
        layers = [path for path, layer in model.named_modules() if path and any(True for _ in layer.parameters(False))]
        return [Head(layers[-1])] if layers else []
    heads = _originating(model, traced)
    return _named_by_timm(model, traced, heads) or heads or _ended_last(model, traced)


def find_auxiliary_heads(run: LazyTrace, heads: Sequence[str]) -> list[str]:
    """Return the paths of classifiers that run only while a network trains, as those of Inception and GoogLeNet.

    These are layers that an evaluation never runs, give as many outputs as the main classifier, and come last in their
    top-level layer.

    Args:
        run: The network with its trace.
        heads: Paths of the main classifiers.
    """
    prefix, model = "", run.model
    child = sole_child(model)
    try:
        executed = {call.path for call in run.read().calls}
    except ModelError:
        return []
    inner = model
    while child is not None and list(inner.get_submodule(child).children()):  # the network inside of a user's class
        prefix = f"{prefix}{child}."
        inner = inner.get_submodule(child)
        child = sole_child(inner)
    widths = {width_of(layer) for path in heads if (layer := _layer(model, path)) is not None}
    last: dict[str, str] = {}
    for path, layer in inner.named_modules():
        if path and next(layer.parameters(False), None) is not None:
            last[path.partition(".")[0]] = path
    idle = [
        prefix + path for top, path in last.items() if prefix + top not in executed and prefix + path not in executed
    ]
    return [path for path in idle if width_of(model.get_submodule(path)) in widths - {None}]


def first_convolution(run: LazyTrace) -> str:
    """Return the path of the first layer of a network that has a width, which takes its images.

    Raises:
        EditError: That layer is no convolution, or takes something that was made of the images.
    """
    model = run.model
    layers = dict(model.named_modules())
    try:
        calls = run.read().calls
        order, shapes = [call.path for call in calls], {call.path: call.input_shapes for call in reversed(calls)}
    except ModelError:
        order, shapes = list(layers), {}
    first = next((path for path in order if isinstance(layers[path], WIDE)), None)
    layer = layers[first] if first is not None else None
    if isinstance(layer, CONVOLUTIONS) and first is not None:
        fed = {shape[1:2] for shape in shapes.get("", ())}
        if not fed or (layer.in_channels,) in fed:
            return first
    kind = f"'{first}' ({type(layer).__name__})" if layer is not None else "no layer with a width"
    if isinstance(layer, CONVOLUTIONS):
        kind += f", which takes {layer.in_channels} channels that are made of the image"
    raise EditError(
        f"{type(model).__name__} begins with {kind}, expected a convolution of the image, so it has no channels to "
        "change. Use replace(model, PATH, …). Nothing was changed."
    )


def width_of(layer: nn.Module) -> int | None:
    """Return how many outputs a linear layer or a convolution gives; None for any other."""
    layer = layer._modules.get(BASE_LAYER) or layer
    if isinstance(layer, (nn.Linear, nn.Bilinear)):
        return layer.out_features
    return layer.out_channels if isinstance(layer, (*CONVOLUTIONS, _ConvTransposeNd)) else None


def _originating(model: nn.Module, traced: Trace) -> list[Head]:
    outputs: dict[str, dict[str, tuple[int, ...]]] = {}
    after: dict[str, set[str]] = {}
    for output in traced.outputs:
        for origin in output.origins:
            path = _path_of(model, origin, traced.projecting)
            outputs.setdefault(path, {})[output.name] = output.shape
            after.setdefault(path, set()).update(origin.after)
    return [Head(path, tuple(shapes.items()), tuple(sorted(after[path]))) for path, shapes in outputs.items()]


def _path_of(model: nn.Module, origin: Origin, projecting: frozenset[str]) -> str:
    """Return the layer whose parameters a projection multiplies with, or the name of the largest of them.

    The layer that owns them, if possible one that is running (of tied weights, the one that is in use); where they
    belong to several, the innermost one around them. It has to be the only thing that the layer does.
    """
    shared, running = origin.projection.parameters, origin.projection.running
    names = [name for ties in shared for name in ties]
    owners = set.intersection(*({_owner(name) for name in ties} for ties in shared))
    around = [path for path in reversed(running) if all(any(is_within(name, path) for name in ties) for ties in shared)]
    in_use = [path for path in reversed(running) if path in owners]
    for path in [*in_use, *sorted(owners), *around[:1]]:
        if path and _is_alone(model, path, names, projecting):
            return _wrapping_adapter(model, path)
    called = [name for name in names if _owner(name) in running]
    return max(called or names, key=lambda name: model.get_parameter(name).ndim)


def _owner(name: str) -> str:
    """Return the path of the layer that a parameter belongs to; a parametrized weight belongs to the layer itself."""
    return name.partition(PARAMETRIZATIONS)[0] if PARAMETRIZATIONS in name else name.rpartition(".")[0]


def _is_alone(model: nn.Module, path: str, names: list[str], projecting: frozenset[str]) -> bool:
    """Return whether a layer multiplies data with no other parameters than `names`."""
    if _is_builtin(model.get_submodule(path)) and not list(model.get_submodule(path).children()):
        return True
    return not any(is_within(name, path) for name in projecting.difference(names))


def _is_builtin(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.nn.")


def _wrapping_adapter(model: nn.Module, path: str) -> str:
    """Return the path of the adapter around a layer, as LoRA's, which adds its own projections; else `path`."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        outer = ".".join(parts[:length])
        if BASE_LAYER in model.get_submodule(outer)._modules:
            return outer
    return path


def _named_by_timm(model: nn.Module, traced: Trace, heads: list[Head]) -> list[Head]:
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    branches = [named] if isinstance(named, str) else list(named or [])
    ended = {call.path: call.ended for call in traced.calls}
    known = {head.path: head for head in heads}
    chosen = []
    for branch in branches:
        inside = [
            path
            for path in ended
            if is_within(path, branch) and any(True for _ in model.get_submodule(path).parameters(False))
        ]
        if inside:
            path = max(inside, key=lambda path: ended[path])
            at_branch = next((path for path in known if is_within(path, branch)), path)
            chosen.append(known.get(at_branch, Head(at_branch)))
        elif branch in ended:  # an Identity, where the network came without a classifier
            chosen.append(Head(branch))
    return chosen


def _ended_last(model: nn.Module, traced: Trace) -> list[Head]:
    """Return the layer with parameters that ended last, where no projection leads to an output."""
    layers = [path for path, layer in model.named_modules() if path and any(True for _ in layer.parameters(False))]
    ended = {call.path: call.ended for call in traced.calls}
    executed = [path for path in layers if path in ended] or layers
    return [Head(max(executed, key=lambda path: ended.get(path, -1)))] if executed else []


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules(remove_duplicate=False)).get(path)


def _moved(head: Head, prefix: str) -> Head:
    return Head(f"{prefix}.{head.path}", head.outputs, tuple(f"{prefix}.{name}" for name in head.after))
