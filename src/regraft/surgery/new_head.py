"""Build the layer that replaces a head: of the same kind, for another number of classes."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from regraft.anatomy.heads import BASE_LAYER, CONVOLUTIONS
from regraft.errors import EditError
from regraft.torch_internals import (
    BatchNormBase,
    ConvTransposeBase,
    InstanceNormBase,
    OrthogonalParametrization,
    SpectralNormParametrization,
    WeightNormParametrization,
    children_of,
    forward_pre_hooks,
    parameters_of,
)

WEIGHT_NORMS = ("weight_g", "weight_v")
LENGTHS = ("original0", "weight_g")  # names under which weight norm keeps the lengths of the rows
PLAIN = (torch.Tensor, nn.Parameter)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_like(old: nn.Module, classes: int, path: str) -> nn.Module:
    """Return a layer of the kind of `old` that gives `classes` outputs, with fresh weights.

    Weight norm, spectral norm and other parametrizations are put on it as they were on the old one; a pruning mask and
    an adapter of `old` belong to its weights, and go with them.

    Raises:
        EditError: It is of a kind that cannot be built for another number of outputs. Nothing was changed.
    """
    base = children_of(old).get(BASE_LAYER)
    if base is not None:
        return layer_like(base, classes, path)
    layer = _plain_layer(old, classes)
    if layer is None:
        raise EditError(
            f"the head '{path}' is a {_kind(old).__name__}, which cannot be built for {classes} classes. "
            "Pass a module in its place, or the path of another layer. Nothing was changed."
        )
    _normalize_alike(layer, old, path)
    return layer


def norm_like(old: nn.Module, before: int, classes: int) -> nn.Module | None:
    """Return a norm or PReLU like `old`, which follows a head of `before` outputs, for `classes`; None for others."""
    if isinstance(old, (BatchNormBase, InstanceNormBase)) and old.num_features == before:
        kind: Any = type(old)
        options = {"eps": old.eps, "momentum": old.momentum, "affine": old.affine}
        return kind(classes, track_running_stats=old.track_running_stats, **options)
    if isinstance(old, nn.LayerNorm) and old.normalized_shape == (before,):
        return nn.LayerNorm(classes, old.eps, old.elementwise_affine, bias=old.bias is not None)
    if isinstance(old, nn.RMSNorm) and old.normalized_shape == (before,):
        return nn.RMSNorm(classes, old.eps, old.elementwise_affine)
    if isinstance(old, nn.PReLU) and old.num_parameters == before > 1:
        return nn.PReLU(classes)
    return None


def kept_tensors(old: nn.Module, new: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Return the pairs of tensors in which rows stand for classes; None where rows of one do not fit the other.

    With weight norm these are the lengths and the directions. Where a norm takes all rows together (spectral norm), one
    class cannot be kept apart from the others.
    """
    if BASE_LAYER in children_of(old) or isinstance(old, TRANSPOSED):
        return None
    old_tensors, new_tensors = _row_tensors(old), _row_tensors(new)
    if old_tensors is None or new_tensors is None or old_tensors.keys() != new_tensors.keys():
        return None
    pairs = [(tensor, new_tensors[name]) for name, tensor in old_tensors.items()]
    return None if any(a.shape[1:] != b.shape[1:] for a, b in pairs) else pairs


def _row_tensors(layer: Any) -> dict[str, torch.Tensor] | None:
    """Return the tensors whose rows are classes, by role; None where rows cannot be taken apart."""
    if parametrize.is_parametrized(layer):
        norms = layer.parametrizations
        if list(norms) != ["weight"] or [type(norm) for norm in norms.weight] != [WeightNormParametrization]:
            return None
        named = {"g": norms.weight.original0, "v": norms.weight.original1}
    elif any(isinstance(hook, SpectralNorm) for hook in forward_pre_hooks(layer).values()):
        return None
    elif all(hasattr(layer, name) for name in WEIGHT_NORMS):
        named = {"g": layer.weight_g, "v": layer.weight_v}
    else:
        named = {"weight": getattr(layer, "weight", None)}
    named["bias"] = getattr(layer, "bias", None)
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
    if any(type(tensor) not in PLAIN for tensor in tensors.values()):  # quantized: rows cannot be taken out
        return None
    is_by_row = all(len(tensor) == len(next(iter(tensors.values()))) for tensor in tensors.values())
    return tensors if tensors and is_by_row else None  # weight norm along another dimension has no length for each row


def _plain_layer(old: Any, classes: int) -> nn.Module | None:
    has_bias = getattr(old, "bias", None) is not None
    if isinstance(old, nn.LazyLinear):
        return nn.LazyLinear(classes, bias=has_bias)
    if isinstance(old, nn.Linear):
        if _kind(old).forward is nn.Linear.forward or not _has_plain_weight(old):
            return nn.Linear(old.in_features, classes, bias=has_bias)
        return _resized(old, classes)
    if isinstance(old, nn.Bilinear):
        return nn.Bilinear(old.in1_features, old.in2_features, classes, bias=has_bias)
    if isinstance(old, (*CONVOLUTIONS, *TRANSPOSED)) and old.groups == 1:
        names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
        names += ["output_padding"] if isinstance(old, ConvTransposeBase) else []
        convolution: Any = next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(old, kind))
        return convolution(old.in_channels, classes, bias=has_bias, **{name: getattr(old, name) for name in names})
    return None


def _has_plain_weight(layer: nn.Module) -> bool:
    weight = parameters_of(layer).get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _resized(old: nn.Linear, classes: int) -> nn.Module | None:
    """Return a resized copy of a layer whose class has a forward of its own, such as a cosine classifier's.

    None where it has other tensors than weight and bias whose size follows the number of classes.
    """
    others = [tensor for name, tensor in old.state_dict().items() if name not in ("weight", "bias")]
    if any(old.out_features in tensor.shape for tensor in others) and old.out_features > 1:
        return None
    plain = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    layer = copy.deepcopy(old)
    layer.out_features = classes
    layer.weight, layer.bias = plain.weight, plain.bias
    return layer.requires_grad_(True)


def _normalize_alike(layer: nn.Module, old: Any, path: str) -> None:
    """Register the norms and other parametrizations of `old` on a fresh layer, in place."""
    if parametrize.is_parametrized(old):
        for name, steps in old.parametrizations.items():
            for step in steps:
                _register(layer, name, step, path)
    for hook in forward_pre_hooks(old).values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about norms that are older than parametrizations
            if isinstance(hook, WeightNorm):
                torch.nn.utils.weight_norm(layer, hook.name, hook.dim)
            elif isinstance(hook, SpectralNorm):
                torch.nn.utils.spectral_norm(layer, hook.name, hook.n_power_iterations, hook.eps, hook.dim)
    _keep_fixed_lengths(layer, old)


def _register(layer: nn.Module, name: str, step: Any, path: str) -> None:
    if isinstance(step, WeightNormParametrization):
        parametrizations.weight_norm(layer, name, step.dim)
    elif isinstance(step, SpectralNormParametrization):
        parametrizations.spectral_norm(layer, name, step.n_power_iterations, step.eps, step.dim)
    elif isinstance(step, OrthogonalParametrization):
        parametrizations.orthogonal(layer, name, step.orthogonal_map.name, use_trivialization=hasattr(step, "base"))
    elif not step.state_dict():
        parametrize.register_parametrization(layer, name, copy.deepcopy(step))
    else:
        raise EditError(
            f"the {name} of the head '{path}' is computed by a {type(step).__name__} with tensors of its own, "
            "which cannot be built for another number of classes. Pass a module in its place. Nothing was changed."
        )


@torch.no_grad()
def _keep_fixed_lengths(layer: nn.Module, old: nn.Module) -> None:
    """Keep the lengths of weight norm frozen where they were (DINO freezes them at 1), at the value that they had."""
    known = dict(old.named_parameters())
    is_trained = any(parameter.requires_grad for parameter in known.values())
    for name, parameter in layer.named_parameters():
        before = known.get(name) if name.endswith(LENGTHS) else None
        if before is not None and is_trained and not before.requires_grad:
            parameter.requires_grad_(False)
            if before.numel() and bool((before == before.flatten()[0]).all()):
                parameter.fill_(before.flatten()[0].item())


def _kind(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, also where parametrizations put another in its place."""
    return type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)
