"""Detect layers that would change or draw in `.train()` although their flags are frozen, and layers that are pinned.

`regraft.freezing.hold` pins a layer. A pinned layer is recognized by the object that replaces its `train`.
"""

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from regraft.torch_internals import BatchNormBase, DropoutBase, NormBase, SpectralNormParametrization, forward_pre_hooks

DROP_PATHS = frozenset({"DropPath", "StochasticDepth", "DropBlock2d", "PatchDropout"})
OBSERVERS = ("torch.ao.quantization", "torchao.quantization")  # modules of the classes that measure activations


def is_pinned(layer: nn.Module) -> bool:
    """Return whether `layer` is pinned to evaluation mode."""
    return getattr(vars(layer).get("train"), "is_pinned", False) is True


def changes_while_training(layer: nn.Module) -> str | None:
    """Describe how a layer that is frozen by its flags would still change or draw in `.train()`; None: it would not."""
    if is_pinned(layer):
        return None
    if isinstance(layer, NormBase) and layer.track_running_stats:
        return "its running statistics would still move"
    if isinstance(layer, DropoutBase) and layer.p > 0:
        return "it would still drop at random"
    if type(layer).__name__ in DROP_PATHS and _drop_rate(layer) > 0:
        return "it would still drop at random"
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout > 0:
        return "it would still drop at random"
    if isinstance(layer, nn.RReLU):
        return "it would still draw its slopes at random"
    if _has_spectral_norm(layer):
        return "its power iteration would still move"
    if rewrites_weight(layer):
        return "it would still rewrite rows whose norm exceeds max_norm"
    if _is_observer(layer):
        return "its observed range would still move"
    return None


def follows_batch(layer: nn.Module) -> bool:
    """Return whether the outputs of `layer` for one sample depend on the rest of its batch, also in evaluation mode."""
    if isinstance(layer, BatchNormBase):
        return layer.running_mean is None and layer.running_var is None
    return _is_observer(layer) and hasattr(layer, "fake_quant_enabled")


def rewrites_weight(layer: nn.Module) -> bool:
    """Return whether the forward of `layer` writes to its weight, in evaluation mode as well."""
    return isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None


def _has_spectral_norm(layer: nn.Module) -> bool:
    hooks = forward_pre_hooks(layer).values()
    return isinstance(layer, SpectralNormParametrization) or any(isinstance(hook, SpectralNorm) for hook in hooks)


def _is_observer(layer: nn.Module) -> bool:
    if not type(layer).__module__.startswith(OBSERVERS):
        return False
    enabled = getattr(layer, "observer_enabled", None)  # only fake quantization has it; an observer always observes
    return "Observer" in type(layer).__name__ if enabled is None else bool(enabled[0])


def _drop_rate(layer: nn.Module) -> float:
    rate = getattr(layer, "drop_prob", getattr(layer, "p", getattr(layer, "prob", 0.0)))
    return float(rate or 0.0)
