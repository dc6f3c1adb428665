"""Check that a layer which is put into a network is called by it, and not only read.

Some forwards never call a layer that they hold, and pass its weight on to a kernel instead: `nn.MultiheadAttention`
does so with its `out_proj`, and `nn.TransformerEncoderLayer`, in evaluation mode, with all layers in it. A new layer
with another forward would then be ignored silently.
"""

from collections.abc import Mapping

from torch import nn

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within, layer_at
from regraft.anatomy.tracing import Trace, trace
from regraft.errors import EditError, ForwardError
from regraft.torch_internals import READ_OF_ATTENTION, forward_hooks, forward_pre_hooks


def require_calls(
    edited: nn.Module, put: Mapping[str, nn.Module], model: nn.Module, run: Trace | None, inputs: Inputs | None
) -> None:
    """Refuse new layers whose forward the network never runs.

    One of the same forward as the layer that it replaces may be read as that one was. Of several layers that a pattern
    selects, those may be left over that the network does not use at all.

    Args:
        edited: The network with the new layers.
        put: The new layers by path.
        model: The network before.
        run: Trace of the edited network in evaluation mode; None: unknown, and nothing is refused.
        inputs: What the forward takes, see `trace`.

    Raises:
        EditError: A layer would never be called. Nothing was changed.
    """
    if run is None:
        return
    uncalled = [path for path in put if not _is_called(edited, path, run)]
    if not uncalled:
        return
    try:
        training = trace(edited, inputs=inputs, training=True)
    except ForwardError:
        return
    uncalled = [path for path in uncalled if not _is_called(edited, path, training)]
    ignored = [path for path in uncalled if not _is_like(layer_at(model, path), put[path])]
    read = [path for path in ignored if _is_read(model, path, run) or _is_read(edited, path, run)]
    path = next(iter(read), None) or (ignored[0] if ignored and len(uncalled) == len(put) else None)
    if path is None:
        return
    holder = path.rpartition(".")[0]
    kind = type(model.get_submodule(holder)).__name__
    where = f"'{holder}' ({kind})" if holder else f"the forward of {kind}"
    advice = (
        f"{where} reads its weight and passes it on, so that the forward of a {type(put[path]).__name__} would be "
        f"ignored. Replace '{holder}' as a whole, or give a layer with the same forward."
        if path in read and holder
        else "The network's forward would ignore the new one."
    )
    raise EditError(f"cannot replace '{path}': that layer is never called. {advice} Nothing was changed.")


def leave_fast_paths(edited: nn.Module, put: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Keep transformer layers of torch.nn that hold a new layer from bypassing it with their fused kernel, in place.

    Raises:
        EditError: The layer reads what the new one does not have.
    """
    for path, new in put.items():
        for above in ("", *ancestors(path)):
            layer = edited.get_submodule(above)
            if isinstance(layer, nn.TransformerEncoder):
                layer.use_nested_tensor = False  # which takes the fused kernel for granted
            if not isinstance(layer, nn.TransformerEncoderLayer) or _is_like(layer_at(model, path), new):
                continue
            if path == f"{above}.self_attn" or path == "self_attn":
                missing = [name for name in READ_OF_ATTENTION if not hasattr(new, name)]
                if missing:
                    raise EditError(
                        f"cannot replace '{path}': nn.TransformerEncoderLayer reads '{missing[0]}' of it, which a "
                        f"{type(new).__name__} does not have. Derive it from nn.MultiheadAttention. "
                        "Nothing was changed."
                    )
            layer.activation_relu_or_gelu = 0  # what it asks first of all that rules the kernel out


def _is_like(old: nn.Module, new: nn.Module) -> bool:
    """Return whether two layers have the same forward, so that it does not matter whether it is called."""
    has_hooks = bool(forward_hooks(new) or forward_pre_hooks(new))
    return type(new).forward is type(old).forward and not has_hooks and "forward" not in vars(new)


def _is_called(model: nn.Module, path: str, run: Trace) -> bool:
    return any(is_within(call.path, name) for name in _names(model, path) for call in run.calls)


def _is_read(model: nn.Module, path: str, run: Trace) -> bool:
    return any(is_within(used, name) for name in _names(model, path) for used in run.first_uses)


def _names(model: nn.Module, path: str) -> list[str]:
    """List the paths of a layer, which may be held in several places."""
    layer = layer_at(model, path)
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
