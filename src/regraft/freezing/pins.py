"""Pins: frozen layers behave as in evaluation, whatever `.train()` is called later.

Which layers are pinned follows from the `requires_grad` flags alone, so pins are recomputed after every change of flags
and can never contradict them:

- a layer with parameters (or a block of such layers) is pinned if none of them is trainable;
- a layer without any (dropout, drop path, a norm without affine parameters) is pinned if the block around it is frozen,
  or if it lies in a frozen front: the parameters registered next after it are frozen, and so is the layer before it, if
  there is any. For a norm without affine parameters the frozen layer before it is enough, as its running statistics
  describe nothing but that layer's output. What opens a block that is trainable as a whole belongs to that block.

A pin consists of a forward pre-hook and an instance attribute `train`. Both are plain picklable objects: the module's
class, its state dict and `deepcopy`, `torch.save` and tracing stay as they are.
"""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from regraft.anatomy.drift import is_pinned as is_pinned
from regraft.anatomy.drift import stay_in_evaluation

# Builtin layers whose forward depends on their mode. Of all other builtin layers the mode changes nothing; of layers
# defined elsewhere it may, so those are pinned too.
MODE_DEPENDENT = (
    _NormBase,
    _DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def sync_pins(model: nn.Module) -> list[str]:
    """Pin what the flags say is frozen, unpin the rest, and return the paths of the pinned layers."""
    pinned = []
    for path, layer, frozen in _walk(model, "", _is_frozen(model) is True):
        if frozen and _depends_on_mode(layer):
            pin(layer)
            pinned.append(path)
        else:
            unpin(layer)
    return pinned


def frozen_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the layers that the flags say are frozen, by the rules of this module's docstring."""
    return [(path, layer) for path, layer, frozen in _walk(model, "", _is_frozen(model) is True) if frozen]


def pin(layer: nn.Module) -> None:
    """Keep `layer` in evaluation mode from now on."""
    layer.training = False
    if not is_pinned(layer):
        layer.register_forward_pre_hook(stay_in_evaluation, prepend=True)
        layer.__dict__["train"] = _PinnedTrain(layer)


def unpin(layer: nn.Module) -> None:
    """Let `layer` follow `.train()` and `.eval()` again."""
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is stay_in_evaluation]:
        del layer._forward_pre_hooks[key]
    layer.__dict__.pop("train", None)


class _PinnedTrain:
    """Takes the place of a pinned layer's `train`, and always chooses evaluation mode."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.layer).train(self.layer, False)


def _walk(layer: nn.Module, path: str, frozen: bool, before: bool | None = None) -> list[tuple[str, nn.Module, bool]]:
    """List all layers from `layer` down with whether each is frozen by the rules of this module's docstring.

    `before` says whether the layer with parameters before `layer` is frozen; None: there is none.
    """
    children = [(name, child, [p.requires_grad for p in child.parameters()]) for name, child in layer.named_children()]
    found = [(path, layer, frozen)]
    for position, (name, child, flags) in enumerate(children):
        following = next((later[0] for _, _, later in children[position + 1 :] if later), True)
        in_front = (before is not False and not following) or (before is True and isinstance(child, _NormBase))
        own = not any(flags) if flags else frozen or in_front
        found += _walk(child, f"{path}.{name}" if path else name, own, False if flags and all(flags) else before)
        before = not any(flags) if flags else before
    return found


def _is_frozen(layer: nn.Module) -> bool | None:
    """Say whether all parameters in `layer` are frozen; None where it has none."""
    flags = [parameter.requires_grad for parameter in layer.parameters()]
    return not any(flags) if flags else None


def _depends_on_mode(layer: nn.Module) -> bool:
    builtin = type(layer).__module__.startswith("torch.nn.modules.")
    return isinstance(layer, MODE_DEPENDENT) or not builtin
