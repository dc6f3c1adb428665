"""A faster copy of a constant part: the same values up to rounding, from converted weights."""

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from regraft.anatomy.dataflow.graph import capture_widely, containers
from regraft.anatomy.modes import in_mode
from regraft.errors import ModelError
from regraft.freezing.hold import has_foreign_hooks
from regraft.frontier.replay import Recording
from regraft.surgery.swap import with_layers

FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm, nn.GroupNorm)  # their outputs are new memory, never a view


def faster(prefix: nn.Module) -> nn.Module:
    """Return a copy of `prefix` for evaluation that takes less time and memory.

    Batch norms are folded into convolutions, convolutions are in channels-last memory format, and activations run in
    place where nothing else reads their input. The outputs differ from those of `prefix` by rounding (about 1e-6 of the
    values' size in float32). `prefix` is not changed, and shares the weights of all layers but the convolutions with
    the copy. A `Recording`, whose forward cannot be traced, is returned unchanged. Layers with hooks, with
    parametrizations, or whose tensors other layers read, are left as they are.

    Source: folding as in torch.nn.utils.fusion.
    """
    if isinstance(prefix, Recording):
        return prefix
    layers = dict(prefix.named_modules())
    calls, read = _dataflow(prefix)
    put: dict[str, nn.Module] = {}
    for conv, norm in _conv_norm_pairs(calls, layers):
        if _is_plain(layers[conv]) and not read & {conv, norm} and _is_foldable(layers[conv], layers[norm]):
            put[conv] = fuse_conv_bn_eval(in_mode(layers[conv], False), in_mode(layers[norm], False))  # pyright: ignore[reportArgumentType]
            put[norm] = nn.Identity()
    for path, layer in layers.items():
        if type(layer) is nn.Conv2d and _is_plain(layer) and path not in put:
            put[path] = copy.deepcopy(layer)
    for layer in put.values():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for path in _inplace_activations(calls, layers):
        put[path] = copy.copy(layers[path])
        setattr(put[path], "inplace", True)  # noqa: B010 - which only some layers have
    return in_mode(with_layers(prefix, put), False)


def _dataflow(prefix: nn.Module) -> tuple[dict[str, list[fx.Node]], set[str]]:
    """Return the calls of each layer in the dataflow, and the layers whose tensors a forward reads directly.

    Both are empty where the network cannot be traced.
    """
    try:
        flow, _ = capture_widely(prefix, containers(prefix))
    except ModelError:
        return {}, set()
    calls: dict[str, list[fx.Node]] = {}
    for node in flow.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls, {str(node.target).rpartition(".")[0] for node in flow.graph.nodes if node.op == "get_attr"}


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a builtin layer has the forward of its class, plain parameters, and no hooks.

    Weight norm, spectral norm and pruning compute the weight in a hook or a parametrization, and keep it as an
    attribute that is not a parameter.
    """
    has_own_code = "forward" in vars(layer) or "weight" in vars(layer) or "bias" in vars(layer)
    return not has_foreign_hooks(layer) and not has_own_code


def _is_foldable(conv: nn.Module, norm: nn.Module) -> bool:
    """Return whether a batch norm scales each channel by a constant, in the convolution's own dtype."""
    tensors = [norm.running_mean, norm.running_var]
    if any(tensor is None for tensor in tensors):
        return False  # it uses batch statistics
    dtypes = {tensor.dtype for tensor in (*norm.parameters(), *tensors) if isinstance(tensor, torch.Tensor)}
    return _is_plain(norm) and dtypes == {parameter.dtype for parameter in conv.parameters()}


def _conv_norm_pairs(calls: dict[str, list[fx.Node]], layers: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """List the convolutions whose output only a batch norm reads, with that batch norm."""
    pairs = []
    for norm, nodes in calls.items():
        if type(layers.get(norm)) is not nn.BatchNorm2d or len(nodes) > 1 or len(nodes[0].all_input_nodes) != 1:
            continue
        source = nodes[0].all_input_nodes[0]
        conv = str(source.target)
        is_conv = source.op == "call_module" and type(layers.get(conv)) is nn.Conv2d
        if is_conv and len(source.users) == len(calls[conv]) == 1:
            pairs.append((conv, norm))
    return pairs


def _inplace_activations(calls: dict[str, list[fx.Node]], layers: dict[str, nn.Module]) -> list[str]:
    """List the activations that can run in place: nothing else reads their input, and it is new memory."""

    def is_free(source: fx.Node) -> bool:
        layer = layers.get(str(source.target)) if source.op == "call_module" else None
        return type(layer) in FRESH and len(source.users) == 1 and layer is not None and _is_plain(layer)

    return [
        path
        for path, nodes in calls.items()
        if type(layers[path]).__module__ == "torch.nn.modules.activation"
        and getattr(layers[path], "inplace", None) is False
        and _is_plain(layers[path])
        and all(is_free(source) for node in nodes for source in node.all_input_nodes)
    ]
