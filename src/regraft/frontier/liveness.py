"""Which values are live: random, trainable, or computed from a live value.

All others are constant: for an image they are the same in every epoch, so they are computed once.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.dataflow.draws import DROPPING, RANDOM
from regraft.anatomy.dataflow.graph import Flow, is_training_flag
from regraft.anatomy.dataflow.values import value_key
from regraft.anatomy.mode_dependence import changes_while_training, is_pinned

ATTENTION = "scaled_dot_product_attention"


def mixed_layers(model: nn.Module) -> list[str]:
    """List the layers that are live in part, which are worth tracing.

    Of the classes in torch.nn, only Sequential and ModuleList are listed.
    """
    return [path for path, layer in model.named_modules() if path and _is_mixed(layer)]


def is_live_layer(layer: nn.Module, unused: Collection[nn.Parameter] = ()) -> bool:
    """Return whether a layer's output for the same input may differ between epochs, in training mode.

    `unused` are parameters that the forward is known not to use.
    """
    ignored = {id(parameter) for parameter in unused}
    is_trained = any(parameter.requires_grad and id(parameter) not in ignored for parameter in layer.parameters())
    return is_trained or not _is_same_in_both_modes(layer)


def live_nodes(flow: Flow, model: nn.Module, dependent: Collection[str] = ()) -> set[fx.Node]:
    """Return the values of a graph that are live in training mode.

    `dependent` are the keys (see `value_key`) of values that are known to depend on more than their image.
    """
    live: set[fx.Node] = set()
    # Nodes are in execution order, so the sources of a node have been decided before it.
    for node in flow.graph.nodes:
        is_fed_by_live = any(source in live for source in node.all_input_nodes)
        if is_fed_by_live or _is_live_by_itself(node, model) or (dependent and value_key(node) in dependent):
            live.add(node)
    return live


def _is_live_by_itself(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return is_live_layer(model.get_submodule(str(node.target)))
    if node.op == "get_attr":  # a parameter that a forward reads itself, or a layer's `training` flag
        return _is_live_attribute(str(node.target), model)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in RANDOM:
        return True
    if name in DROPPING:
        return _argument(node, "p", 1, 0.5) != 0 and _argument(node, "training", 2, True) is not False
    if name == ATTENTION:
        return _argument(node, "dropout_p", 4, 0.0) != 0
    if name == "batch_norm":
        return _argument(node, "training", 5, False) is True
    return False


def _is_live_attribute(path: str, model: nn.Module) -> bool:
    owner, _, name = path.rpartition(".")
    layer = model.get_submodule(owner)
    if is_training_flag(path):
        return not is_pinned(layer)
    value = getattr(layer, name, None)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_mixed(layer: nn.Module) -> bool:
    if type(layer).__module__.startswith("torch.nn.modules.") and not isinstance(layer, (nn.Sequential, nn.ModuleList)):
        return False
    flags = {parameter.requires_grad for parameter in layer.parameters()}
    if flags == {True}:
        return False  # live as a whole
    return True in flags or not _is_same_in_both_modes(layer)


def _is_same_in_both_modes(layer: nn.Module) -> bool:
    """Return whether a layer without trainable parameters computes the same in training and evaluation mode."""
    return not any(_may_depend_on_mode(inner) for inner in layer.modules())


def _may_depend_on_mode(layer: nn.Module) -> bool:
    if is_pinned(layer):
        return False
    # A class of the user's own may read `self.training` in its forward, so only torch's own are known not to.
    builtin = type(layer).__module__.startswith("torch.nn.modules.")
    return changes_while_training(layer) is not None or not builtin


def _argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default
