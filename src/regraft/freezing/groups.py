"""Parameter groups and optimizers over the trainable parameters of a model."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.arguments import check_arguments
from regraft.errors import ConfigError, SelectionError, nearest
from regraft.torch_internals import NormBase
from regraft.wording import for_caller

NORM_LAYERS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)

MOMENTUM = 0.9  # the value that timm's own factory passes to optimizers with momentum


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    *,
    backbone_lr: float | None = None,
    no_decay: Collection[str] = ("bias", "norm"),
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` by learning rate and decay for an optimizer; frozen ones are left out.

    Args:
        model: Any module.
        lr: Learning rate of the head, and of everything where neither `layer_decay` nor `backbone_lr` is given.
        weight_decay: Decay of weight matrices and kernels.
        layer_decay: Factor from each block to the one before it (see `parameter_depths`), in (0, 1]: a parameter d
            blocks before the head learns with `lr * layer_decay ** d`. Source: BEiT, https://arxiv.org/abs/2106.08254.
        backbone_lr: Learning rate of everything but the head.
        no_decay: What is not decayed: `"bias"` (biases, other vectors, and what `no_weight_decay` of the model, or of a
            network inside of it, names), `"norm"` (parameters of normalization layers), in any combination.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, in the order of their first parameters.

    Raises:
        SelectionError: Nothing is trainable.
        ConfigError: Both `layer_decay` and `backbone_lr` are given, `layer_decay` is not in (0, 1], a rate or a decay
            is negative, or `no_decay` names something else.
    """
    check_arguments(param_groups, locals())
    return groups_of(
        ModelFacts(model), lr, weight_decay, layer_decay=layer_decay, backbone_lr=backbone_lr, no_decay=no_decay
    )


def groups_of(
    facts: ModelFacts,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    backbone_lr: float | None = None,
    no_decay: Collection[str] = ("bias", "norm"),
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a network; see `param_groups`."""
    model = facts.model
    _require_rates(lr=lr, weight_decay=weight_decay, backbone_lr=backbone_lr)
    rate_of = _rates(facts, lr, layer_decay, backbone_lr)
    undecayed = undecayed_names(model, no_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in undecayed else weight_decay
            groups.setdefault((rate_of(name), decay), []).append(parameter)
    if not groups:
        raise SelectionError(_nothing_trainable(model))
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def _require_rates(**rates: float | None) -> None:
    for name, rate in rates.items():
        if rate is not None and rate < 0:
            raise ConfigError(f"{name} is {rate}, expected a number from 0 up. Nothing was changed.")


def _rates(
    facts: ModelFacts, lr: float, layer_decay: float | None, backbone_lr: float | None
) -> Callable[[str], float]:
    """Return the function from a parameter's name to its learning rate."""
    if layer_decay is not None and backbone_lr is not None:
        raise ConfigError("layer_decay and backbone_lr exclude each other. Pass one of them.")
    if layer_decay is not None:
        if not 0 < layer_decay <= 1:
            raise ConfigError(f"layer_decay is {layer_decay}, expected a factor in (0, 1], as in 0.75.")
        depths = facts.depths
        deepest = max(depths.values(), default=0)
        return lambda name: lr * layer_decay ** (deepest - depths.get(name, deepest))
    if backbone_lr is not None:
        return lambda name: lr if name in facts.head_parameters else backbone_lr
    return lambda name: lr


def undecayed_names(model: nn.Module, no_decay: Collection[str]) -> set[str]:
    """Return the names of the parameters that are not decayed; see `param_groups`."""
    if unknown := sorted(set(no_decay) - {"bias", "norm"}):
        raise ConfigError(f"no_decay names {unknown[0]!r}, expected 'bias', 'norm', both, or an empty tuple.")
    names = set()
    if "norm" in no_decay:
        norms = [path for path, layer in model.named_modules() if isinstance(layer, NORM_LAYERS)]
        names |= {f"{path}.{name}" for path in norms for name, _ in model.get_submodule(path).named_parameters()}
    if "bias" in no_decay:
        names |= {name for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith("bias")}
        for path, layer in model.named_modules():  # a network inside of another module names its own as well
            own: Any = getattr(layer, "no_weight_decay", None)
            named: Any = own() if callable(own) else ()
            names |= {f"{path}.{name}".lstrip(".") for name in named}
    return names


def build_optimizer(
    name_or_class: str | Callable[..., torch.optim.Optimizer],
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    backbone_lr: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of `model`; biases and norms are not decayed.

    Args:
        name_or_class: A class, or the name of one of `torch.optim` in any case (`"adamw"`, `"SGD"`), or of one of
            timm's (`"lamb"`, `"timm/adamw"` where both have it).
        model: Any module.
        lr: Learning rate.
        weight_decay: Decay of weight matrices and kernels.
        layer_decay: See `param_groups`.
        backbone_lr: See `param_groups`.
        **options: Passed on to the class, as in `momentum=0.9`.

    Raises:
        SelectionError: Nothing is trainable; the message says what is frozen and how to thaw it.
        ConfigError: No optimizer has that name, or it does not take these options.
    """
    check_arguments(build_optimizer, locals())
    rates = {"lr": lr, "weight_decay": weight_decay, "layer_decay": layer_decay, "backbone_lr": backbone_lr}
    return make_optimizer(name_or_class, ModelFacts(model), rates, options)


def make_optimizer(
    name_or_class: str | Callable[..., torch.optim.Optimizer],
    facts: ModelFacts,
    rates: Mapping[str, Any],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of a network; see `build_optimizer`.

    Args:
        name_or_class: See `build_optimizer`.
        facts: The network.
        rates: The arguments of `param_groups` but the model.
        options: Passed on to the class.
    """
    maker: Any = optimizer_class(name_or_class) if isinstance(name_or_class, str) else name_or_class
    lr, groups = rates["lr"], groups_of(facts, **rates)
    name = getattr(maker, "__name__", name_or_class)  # timm's variants are partial functions without a name
    if maker is torch.optim.Muon:
        _require_matrices(facts.model)
    try:
        optimizer = maker(groups, lr=lr, **options)
    except Exception as error:  # the options are passed on unchecked, and the constructor may raise anything
        raise ConfigError(
            f"{name} does not take {options or {'lr': lr}}: {error}. {_nearest_options(maker, options)}".rstrip()
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{name} makes a {type(optimizer).__name__}, expected an optimizer. Name one, as 'adamw'.")
    return optimizer


def _nearest_options(maker: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Return hints on the options of a constructor that are nearest to the unknown ones."""
    try:
        known = inspect.signature(maker).parameters
    except (TypeError, ValueError):  # a builtin has no signature
        return ""
    return " ".join(filter(None, (nearest(option, known) for option in options if option not in known)))


def optimizer_class(name: str) -> Any:
    """Return the class of an optimizer of torch.optim or timm.

    Raises:
        ConfigError: Neither has one of that name.
    """
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() in known:
        return known[name.lower()]
    import timm.optim as timm_optim  # costs a second, and few need it

    bare = name.lower().removeprefix("timm/")
    timm_names = [str(known_name) for known_name in cast(Any, timm_optim).list_optimizers()]
    if bare not in timm_names:
        hint = nearest(bare, {*known, *timm_names}) or f"torch.optim has {', '.join(known)}."
        raise ConfigError(f"no optimizer '{name}' in torch.optim or timm. {hint}")
    try:
        maker = cast(Any, timm_optim).get_optimizer_class(bare)
        has_momentum = cast(Any, timm_optim).get_optimizer_info(bare).has_momentum
    except AssertionError as error:  # it needs a library or a device that is missing
        raise ConfigError(f"the optimizer '{name}' cannot be used here: {error}. Choose another, as adamw.") from error
    return functools.partial(maker, momentum=MOMENTUM) if has_momentum else maker


def _require_matrices(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim != 2:
            raise ConfigError(
                f"torch's Muon trains matrices alone, and '{name}' has the shape {tuple(parameter.shape)}. Use "
                "timm/muon, which trains matrices and kernels by Muon and the rest by AdamW, or freeze the others. "
                "Nothing was changed."
            )


def _nothing_trainable(model: nn.Module) -> str:
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if not children and next(model.parameters(), None) is None:
        return f"{type(model).__name__} has no parameters, so there is nothing to train."
    last = f"'{children[-1]}'" if children else ""
    return (
        f"every parameter of {type(model).__name__} is frozen, so there is nothing to train. "
        + for_caller(
            python=f"Thaw some with regraft.unfreeze(model, {last})",
            command="Freeze fewer layers with --freeze, or pass --unfreeze-all",
        )
        + (f"; top-level layers: {', '.join(children)}." if children else ".")
    )
