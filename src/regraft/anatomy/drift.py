"""Which layers would change or draw in `.train()` although their flags say that they are frozen, and which are pinned.

The marker of a pinned layer is a forward pre-hook, `stay_in_evaluation`; `regraft.freezing.pins` sets and removes it.
"""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

DROP_PATHS = frozenset({"DropPath", "StochasticDepth", "DropBlock2d", "PatchDropout"})


def stay_in_evaluation(layer: nn.Module, args: Any) -> None:
    """Put a pinned layer back into evaluation mode before it runs: the forward pre-hook that makes it a pinned one."""
    if layer.training:  # somebody assigned the attribute, as `.train()` does not reach it
        layer.training = False


def is_pinned(layer: nn.Module) -> bool:
    """Say whether `layer` is pinned to evaluation mode."""
    return any(hook is stay_in_evaluation for hook in layer._forward_pre_hooks.values())


def would_move(layer: nn.Module) -> str | None:
    """Say how a layer that is frozen by its flags would still change or draw in `.train()`; None where it would not."""
    if is_pinned(layer):
        return None
    if isinstance(layer, _NormBase) and layer.track_running_stats:
        return "its running statistics would still move"
    if isinstance(layer, _DropoutNd) and layer.p > 0:
        return "it would still drop at random"
    if type(layer).__name__ in DROP_PATHS and _drop_rate(layer) > 0:
        return "it would still drop at random"
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout > 0:
        return "it would still drop at random"
    if isinstance(layer, nn.RReLU):
        return "it would still draw its slopes at random"
    return None


def _drop_rate(layer: nn.Module) -> float:
    rate = getattr(layer, "drop_prob", getattr(layer, "p", getattr(layer, "prob", 0.0)))
    return float(rate or 0.0)
