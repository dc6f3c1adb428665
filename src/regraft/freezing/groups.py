"""What an optimizer gets: the trainable parameters, grouped, and nothing else."""

from typing import Any

import torch
from torch import nn

from regraft.errors import ConfigError, SelectionError, nearest

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, no_decay: tuple[str, ...] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for an optimizer; frozen ones are left out.

    Args:
        model: Any module.
        lr: Learning rate of every group.
        weight_decay: Decay of the first group.
        no_decay: Which parameters form a second group without decay: `"bias"` (biases and other vectors), `"norm"`
            (those of normalization layers), in any combination.

    Raises:
        SelectionError: Nothing is trainable.
    """
    decayed, undecayed = [], []
    norm_parameters = {id(p) for layer in model.modules() if isinstance(layer, NORM_LAYERS) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_norm = "norm" in no_decay and id(parameter) in norm_parameters
        is_bias = "bias" in no_decay and (parameter.ndim <= 1 or name.endswith("bias"))
        (undecayed if is_norm or is_bias else decayed).append(parameter)
    if not decayed and not undecayed:
        raise SelectionError(_nothing_trainable(model))
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name_or_class: str | type[torch.optim.Optimizer],
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of `model`; biases and norms are not decayed.

    Args:
        name_or_class: A class, or the name of one of `torch.optim` in any case (`"adamw"`, `"SGD"`).
        model: Any module.
        lr: Learning rate.
        weight_decay: Decay of weight matrices and kernels.
        **options: Passed on to the class, as in `momentum=0.9`.

    Raises:
        SelectionError: Nothing is trainable; the message says what is frozen and how to thaw it.
        ConfigError: No optimizer has that name, or it does not take these options.
    """
    maker: Any = _optimizer_class(name_or_class) if isinstance(name_or_class, str) else name_or_class
    groups = param_groups(model, lr, weight_decay)
    try:
        return maker(groups, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{maker.__name__} does not take {options or {'lr': lr}}: {error}.") from error


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise ConfigError(f"no optimizer '{name}' in torch.optim. {nearest(name.lower(), known)}".rstrip())
    return known[name.lower()]


def _nothing_trainable(model: nn.Module) -> str:
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if not children and next(model.parameters(), None) is None:
        return f"{type(model).__name__} has no parameters, so there is nothing to train."
    last = f"'{children[-1]}'" if children else ""
    return (
        f"every parameter of {type(model).__name__} is frozen, so there is nothing to train. "
        f"Thaw some with regraft.unfreeze(model, {last})"
        + (
            f" (--freeze fewer layers, or --unfreeze-all); top-level layers: {', '.join(children)}."
            if children
            else "."
        )
    )
