"""How a layer is held in evaluation: what is put on a module, and taken off again without a trace.

A `PinState` is all that there is on one module. Applying one puts on what is missing and takes off what is too much:

- an instance attribute `train`, which chooses evaluation mode for a pinned layer whatever it is asked for, and which at
  the root of what was frozen first lets all pins follow the flags as they are then;
- a forward pre-hook that puts the mode back where somebody assigned `.training`;
- hooks that put back state that a forward writes to although nothing trains: buffers of layers whose code is not that
  of a well-known library (observers, codebooks), and the rows that an embedding with `max_norm` rewrites. Copies are
  taken before each forward, so that values which somebody loads between two forwards stay. Version counters of tensors
  would be cheaper, but do not notice `buffer.data.copy_(...)`, which is how most codebooks are written;
- an instance attribute `reset_running_stats` without effect, since `torch.optim.swa_utils.update_bn` resets every batch
  norm but computes only those anew that train;
- an instance attribute `__prepare_scriptable__`, by which `torch.jit.script` asks for a module that it can compile: a
  copy without the hooks, whose untyped arguments TorchScript refuses.

All of them are plain picklable objects: the module's class, its state dict and `deepcopy`, `torch.save` and tracing
stay as they are.

`nn.TransformerEncoder` chooses its nested fast path by the mode of its first layer, and its layers take theirs only
where no module in them has a hook. So nothing inside of an `nn.TransformerEncoderLayer` gets one: those of the module
around it, called `host` here, do that work for all that is pinned below it.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.anatomy.mode_dependence import is_pinned, rewrites_weight
from regraft.anatomy.shape_copies import shared_copy

KEPT, NESTED = "_regraft_kept", "_regraft_nested"  # on a module while its forward runs, never longer
SOUND = ("torch.nn.modules.", "torchvision.", "timm.", "transformers.")  # in evaluation these write to caches at most
TRAIN, RESET, SCRIPTABLE = "train", "reset_running_stats", "__prepare_scriptable__"


def stay_in_evaluation(layer: nn.Module, args: Any) -> None:
    """Put a pinned layer back into evaluation mode before it runs."""
    if layer.training:  # somebody assigned the attribute, as `.train()` does not reach it
        layer.training = False


def hold_below(host: nn.Module, args: Any) -> None:
    """Put what is pinned below `host` back into evaluation mode, and keep it from a nested path that would fail.

    The nested path is taken where the first layer is in evaluation mode and frozen; a later layer that is trainable
    then fails on nested tensors.
    """
    for layer in host.modules():
        if is_pinned(layer):
            stay_in_evaluation(layer, args)
    if isinstance(host, nn.TransformerEncoder) and not torch.compiler.is_compiling():
        nested: bool = getattr(host, "use_nested_tensor", False)
        vars(host).setdefault(NESTED, []).append(nested)
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in host.parameters())
        host.use_nested_tensor = nested and not host.training and not learns


def release_below(host: nn.Module, args: Any, output: Any) -> None:
    """Undo what `hold_below` has done to a `nn.TransformerEncoder`."""
    if vars(host).get(NESTED):
        host.use_nested_tensor = vars(host)[NESTED].pop()
        if not vars(host)[NESTED]:
            del vars(host)[NESTED]


def remember_state(module: nn.Module, args: Any) -> None:
    """Copy the state that pinned layers in `module` may write to in their forward."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # of torch.jit.trace
        return
    kept = [
        (tensors, name, tensor, tensor.detach().clone())
        for layer in module.modules()
        if is_pinned(layer)
        for tensors, name, tensor in _written(layer)
    ]
    vars(module).setdefault(KEPT, []).append(kept)


def restore_state(module: nn.Module, args: Any, output: Any) -> None:
    """Put the state that `remember_state` has copied back, also after an exception."""
    if not vars(module).get(KEPT):
        return
    for tensors, name, tensor, value in vars(module)[KEPT].pop():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensors[name] = value
            continue
        tensors[name] = tensor
        if not any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data.copy_(value)  # past autograd's version counter, as nothing that it may have saved has changed
    if not vars(module)[KEPT]:
        del vars(module)[KEPT]


def keeps_state(layer: nn.Module) -> bool:
    """Return whether the forward of `layer` may write to its state in evaluation mode as well."""
    return next(_written(layer), None) is not None


def _written(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Yield the tensors that the forward of `layer` may write to in evaluation mode, and where they are kept."""
    if not type(layer).__module__.startswith(SOUND) or has_foreign_hooks(layer):
        for name, tensor in layer._buffers.items():
            if tensor is not None and not is_lazy(tensor):
                yield layer._buffers, name, tensor
    weight = layer._parameters.get("weight") if rewrites_weight(layer) else None
    if weight is not None:
        yield layer._parameters, "weight", weight


def is_builtin(layer: nn.Module) -> bool:
    """Return whether the class of `layer` is one of torch.nn's own."""
    return type(layer).__module__.startswith("torch.nn.modules.")


def has_foreign_hooks(layer: nn.Module) -> bool:
    """Return whether hooks that are not this library's, which only look, take part in the forward of `layer`."""
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    return not all(str(getattr(hook, "__module__", "")).startswith("regraft.") for hook in hooks)


BEFORE = (stay_in_evaluation, hold_below, remember_state)
AFTER = (release_below, restore_state)
PIN_HOOKS = (*BEFORE, *AFTER)
HOLD = frozenset({stay_in_evaluation})
HOST = frozenset({hold_below, release_below})
GUARD = frozenset({remember_state, restore_state})
ByPath = Literal["alone", "among"]


@dataclass(frozen=True)
class PinState:
    """What holds one module.

    Attributes:
        pinned: Whether it stays in evaluation mode.
        by_path: Whether that is because it was selected itself, as it has no flags that could say so: `alone`, or
            `among` parameters, so that it is thawed when all of those around it are.
        follow: Called with the module before it goes into training mode, so that pins follow the flags; None: not.
        hooks: Which of this module's hooks it carries.
    """

    pinned: bool = False
    by_path: ByPath | None = None
    follow: Callable[[nn.Module], Any] | None = None
    hooks: frozenset[Callable[..., None]] = frozenset()

    @classmethod
    def of(cls, layer: nn.Module) -> "PinState":
        """Return what holds `layer` now."""
        keeper = vars(layer).get(TRAIN)
        hooks = frozenset(
            h for h in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()) if h in PIN_HOOKS
        )
        if not isinstance(keeper, Keeper):
            return cls(hooks=hooks)
        return cls(keeper.is_pinned, keeper.by_path, keeper.follow, hooks)

    def apply(self, layer: nn.Module) -> None:
        """Hold `layer` in this way and no other."""
        if isinstance(layer, torch.jit.ScriptModule):  # takes neither hooks nor attributes
            return
        if self.of(layer) != self:
            self._change(layer)
        if self.pinned and layer.training:
            layer.training = False

    def _change(self, layer: nn.Module) -> None:
        _remove_hooks(layer, keep=self.hooks)
        now = self.of(layer).hooks
        for hook in BEFORE[::-1]:
            if hook in self.hooks - now:
                layer.register_forward_pre_hook(hook, prepend=True)
        for hook in AFTER:
            if hook in self.hooks - now:
                layer.register_forward_hook(hook, always_call=True)
        keeper = vars(layer).get(TRAIN)
        if self.pinned or self.follow is not None:
            if not isinstance(keeper, Keeper):
                keeper = vars(layer)[TRAIN] = Keeper(layer, keeper)
            keeper.is_pinned, keeper.by_path, keeper.follow = self.pinned, self.by_path, self.follow
        elif isinstance(keeper, Keeper):
            keeper.leave()
        _put(layer, RESET, NoReset() if self.pinned and hasattr(type(layer), RESET) else None, NoReset)
        _put(layer, SCRIPTABLE, Scriptable(layer) if self != PinState() else None, Scriptable)


class Keeper:
    """Takes the place of a module's `train`, with whatever arguments and return value that has.

    Attributes:
        layer: The module.
        is_pinned: Whether evaluation mode is chosen whatever is asked for.
        by_path: See `PinState`, as `follow`.
    """

    def __init__(self, layer: nn.Module, own: Any = None) -> None:
        self.layer = layer
        self.is_pinned = False
        self.by_path: ByPath | None = None
        self.follow: Callable[[nn.Module], Any] | None = None
        self._own = own  # a `train` that the user had put on this very module
        self._look: int | None = None  # of the model when `follow` was last called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Change the mode of the layer, or of all that is not pinned in it."""
        trains = kwargs.get("mode", args[0] if args else True)  # in evaluation mode pins change nothing
        if trains and self.follow is not None and (look := _look_of(self.layer)) != self._look:
            self.follow(self.layer)
            self._look = _look_of(self.layer) if self.follow is not None else look
        train = self._own if self._own is not None else getattr(type(self.layer), TRAIN).__get__(self.layer)
        if not self.is_pinned:
            return train(*args, **kwargs)
        if "mode" in kwargs:
            kwargs = {**kwargs, "mode": False}
        else:
            args = (False, *args[1:])
        result = train(*args, **kwargs) if _takes_mode(train) else nn.Module.train(self.layer, False)
        self.layer.training = False  # whatever a `train` of the user's own makes of the mode
        return result

    def leave(self) -> None:
        """Give the module its own `train` back."""
        self.is_pinned, self.follow = False, None
        if self._own is None:
            vars(self.layer).pop(TRAIN, None)
        else:
            vars(self.layer)[TRAIN] = self._own


class NoReset:
    """Takes the place of `reset_running_stats`, and leaves the statistics of a pinned layer as they are."""

    def __call__(self) -> None:
        """Change nothing."""


class Scriptable:
    """Gives `torch.jit.script` a copy of a module, with the same tensors and modes, that has no hooks of pins."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self) -> nn.Module:
        """Return the copy. It stays pinned by its `train`, as `torch.jit.script` puts it into the module around it."""
        copied = shared_copy(self.layer)
        for part in copied.modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue
            if is_pinned(part):
                part.training = False
            _remove_hooks(part, keep=frozenset())
            for name, kind in ((RESET, NoReset), (SCRIPTABLE, Scriptable)):
                _put(part, name, None, kind)
        return copied


def _look_of(model: nn.Module) -> int:
    """Return a number that changes with all that pins depend on: working them out takes 20 times as long."""
    return hash(
        tuple(
            (
                type(layer),
                is_pinned(layer),
                len(layer._forward_pre_hooks),
                len(layer._forward_hooks),
                *(parameter.requires_grad for parameter in layer._parameters.values() if parameter is not None),
            )
            for layer in model.modules()
        )
    )


def _remove_hooks(layer: nn.Module, keep: frozenset[Callable[..., None]]) -> None:
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in PIN_HOOKS and hook not in keep]:
            del hooks[key]
            layer._forward_hooks_always_called.pop(key, None)


def _put(layer: nn.Module, name: str, value: Any, kind: type) -> None:
    """Set the attribute `name` of this very module; None: take it away where it is one of `kind`."""
    own = vars(layer).get(name)
    if value is None and isinstance(own, kind):
        del vars(layer)[name]
    elif value is not None and own is None:
        vars(layer)[name] = value


def _takes_mode(train: Callable[..., Any]) -> bool:
    if getattr(train, "__func__", None) is nn.Module.train:  # a signature takes its time
        return True
    try:
        return bool(inspect.signature(train).parameters)
    except (TypeError, ValueError):
        return True
