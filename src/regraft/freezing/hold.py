"""Keep a layer in evaluation mode: the hooks and attributes that a pin puts on a module, and how they are removed.

A `PinState` describes everything that pins have put on one module. Applying it adds what is missing and removes the
rest:

- an instance attribute `train`, which selects evaluation mode for a pinned layer whatever mode is requested, and which
  at the root of a frozen model first recomputes all pins from the flags;
- a forward pre-hook that resets the mode where `.training` was assigned directly;
- hooks that restore state that a forward writes to in evaluation mode as well: buffers of layers from outside of the
  well-known libraries (observers, codebooks), and the rows that an embedding with `max_norm` rewrites. Copies are taken
  before each forward, so that values loaded between two forwards stay. Version counters of tensors would be cheaper,
  but do not notice `buffer.data.copy_(...)`, which is how most codebooks are written;
- an instance attribute `reset_running_stats` without effect, since `torch.optim.swa_utils.update_bn` resets every batch
  norm but recomputes the statistics only of those that train;
- an instance attribute `__prepare_scriptable__`, by which `torch.jit.script` asks for a module that it can compile: a
  copy without the hooks, whose untyped arguments TorchScript refuses.

All of them are plain picklable objects: the module's class, its state dict and `deepcopy`, `torch.save` and tracing
stay as they are.

`nn.TransformerEncoder` chooses its nested fast path by the mode of its first layer, and its layers take their fast path
only where no module in them has a hook. So no module inside of an `nn.TransformerEncoderLayer` gets one: the hooks of
the module around it, called `host` here, act on everything pinned below it.
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
from regraft.torch_internals import (
    buffers_of,
    forward_hooks,
    forward_pre_hooks,
    is_jit_tracing,
    parameters_of,
    remove_hooks,
)

KEPT, NESTED = "_regraft_kept", "_regraft_nested"  # attributes of a module while its forward runs, never longer
TRUSTED_LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.", "transformers.")  # write only to caches in eval
TRAIN, RESET, SCRIPTABLE = "train", "reset_running_stats", "__prepare_scriptable__"


# Modules that are saved with `torch.save` refer to the functions and classes of this file by name: renaming one breaks
# files that exist.


def stay_in_evaluation(layer: nn.Module, args: Any) -> None:
    """Put a pinned layer back into evaluation mode before it runs."""
    if layer.training:  # the attribute was assigned directly, as `.train()` does not reach it
        layer.training = False


def hold_below(host: nn.Module, args: Any) -> None:
    """Put the pinned layers below `host` back into evaluation mode, and disable a nested fast path that would fail.

    It is taken where the first layer is in evaluation mode and frozen; a later layer that is trainable then fails on
    nested tensors.
    """
    for layer in host.modules():
        if is_pinned(layer):
            stay_in_evaluation(layer, args)
    if isinstance(host, nn.TransformerEncoder) and not torch.compiler.is_compiling():
        # A stack, not one value: a forward may call its host again before it ends.
        nested: bool = getattr(host, "use_nested_tensor", False)
        vars(host).setdefault(NESTED, []).append(nested)
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in host.parameters())
        host.use_nested_tensor = nested and not host.training and not learns


def release_below(host: nn.Module, args: Any, output: Any) -> None:
    """Restore the `use_nested_tensor` that `hold_below` has changed on an `nn.TransformerEncoder`."""
    if vars(host).get(NESTED):
        host.use_nested_tensor = vars(host)[NESTED].pop()
        if not vars(host)[NESTED]:
            del vars(host)[NESTED]


def remember_state(module: nn.Module, args: Any) -> None:
    """Copy the state that pinned layers in `module` may write to in their forward."""
    if torch.compiler.is_compiling() or is_jit_tracing():
        return
    kept = [
        (tensors, name, tensor, tensor.detach().clone())
        for layer in module.modules()
        if is_pinned(layer)
        for tensors, name, tensor in _mutable_tensors(layer)
    ]
    vars(module).setdefault(KEPT, []).append(kept)


def restore_state(module: nn.Module, args: Any, output: Any) -> None:
    """Restore the state that `remember_state` has copied, also after an exception."""
    if not vars(module).get(KEPT):
        return
    for tensors, name, tensor, value in vars(module)[KEPT].pop():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():  # torch refuses writes to it here
            tensors[name] = value
            continue
        tensors[name] = tensor  # the forward may have put another tensor in its place
        # torch refuses in-place writes to an expanded tensor, whose elements share memory.
        if not any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data.copy_(value)  # past autograd's version counter, as nothing that it may have saved has changed
    if not vars(module)[KEPT]:
        del vars(module)[KEPT]


def keeps_state(layer: nn.Module) -> bool:
    """Return whether the forward of `layer` may write to its state in evaluation mode as well."""
    return next(_mutable_tensors(layer), None) is not None


def _mutable_tensors(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Yield the tensors that the forward of `layer` may write to in evaluation mode, as (dict, name, tensor)."""
    if not type(layer).__module__.startswith(TRUSTED_LIBRARIES) or has_foreign_hooks(layer):
        for name, tensor in buffers_of(layer).items():
            if tensor is not None and not is_lazy(tensor):
                yield buffers_of(layer), name, tensor
    weight = parameters_of(layer).get("weight") if rewrites_weight(layer) else None
    if weight is not None:
        yield parameters_of(layer), "weight", weight


def is_builtin(layer: nn.Module) -> bool:
    """Return whether the class of `layer` is one of torch.nn's own."""
    return type(layer).__module__.startswith("torch.nn.modules.")


def has_foreign_hooks(layer: nn.Module) -> bool:
    """Return whether hooks other than this library's take part in the forward of `layer`."""
    hooks = (*forward_pre_hooks(layer).values(), *forward_hooks(layer).values())
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
    """What pins have put on one module.

    Attributes:
        pinned: Whether it stays in evaluation mode.
        by_path: How a layer without parameters was selected, which no flag records: `alone`, or `among` parameters, so
            that it is unpinned when all parameters around it are unfrozen. None: it was not selected itself.
        follow: Called with the module before it goes into training mode, to recompute the pins; None: not called.
        hooks: Which of `PIN_HOOKS` it has.
    """

    pinned: bool = False
    by_path: ByPath | None = None
    follow: Callable[[nn.Module], Any] | None = None
    hooks: frozenset[Callable[..., None]] = frozenset()

    @classmethod
    def of(cls, layer: nn.Module) -> "PinState":
        """Return the state that `layer` has now."""
        keeper = vars(layer).get(TRAIN)
        hooks = frozenset(
            h for h in (*forward_pre_hooks(layer).values(), *forward_hooks(layer).values()) if h in PIN_HOOKS
        )
        if not isinstance(keeper, Keeper):
            return cls(hooks=hooks)
        return cls(keeper.is_pinned, keeper.by_path, keeper.follow, hooks)

    def apply(self, layer: nn.Module) -> None:
        """Replace the state of `layer` by this one."""
        if isinstance(layer, torch.jit.ScriptModule):  # takes neither hooks nor attributes
            return
        if self.of(layer) != self:
            self._change(layer)
        if self.pinned and layer.training:
            layer.training = False

    def _change(self, layer: nn.Module) -> None:
        _remove_hooks(layer, keep=self.hooks)
        present = self.of(layer).hooks
        for hook in BEFORE[::-1]:  # each is prepended, so the last one registered runs first: before the user's own
            if hook in self.hooks - present:
                layer.register_forward_pre_hook(hook, prepend=True)
        for hook in AFTER:
            if hook in self.hooks - present:
                layer.register_forward_hook(hook, always_call=True)  # also after an exception, to drop the copies
        keeper = vars(layer).get(TRAIN)
        if self.pinned or self.follow is not None:
            if not isinstance(keeper, Keeper):  # through `vars`, past a `__setattr__` of the user's class
                keeper = vars(layer)[TRAIN] = Keeper(layer, keeper)
            keeper.is_pinned, keeper.by_path, keeper.follow = self.pinned, self.by_path, self.follow
        elif isinstance(keeper, Keeper):
            keeper.leave()
        _put(layer, RESET, NoReset() if self.pinned and hasattr(type(layer), RESET) else None, NoReset)
        _put(layer, SCRIPTABLE, Scriptable(layer) if self != PinState() else None, Scriptable)


class Keeper:
    """Replaces a module's `train`, and passes on its arguments and return value.

    Attributes:
        layer: The module.
        is_pinned: Whether evaluation mode is selected whatever mode is requested.
        by_path: See `PinState`.
        follow: See `PinState`.
    """

    def __init__(self, layer: nn.Module, own: Any = None) -> None:
        self.layer = layer
        self.is_pinned = False
        self.by_path: ByPath | None = None
        self.follow: Callable[[nn.Module], Any] | None = None
        self._own = own  # an instance attribute `train` that the user had set
        self._look: int | None = None  # fingerprint of the model when `follow` was last called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Set the mode of the layer and of everything in it that is not pinned."""
        trains = kwargs.get("mode", args[0] if args else True)  # in evaluation mode pins change nothing
        if trains and self.follow is not None and (fingerprint := _fingerprint(self.layer)) != self._look:
            self.follow(self.layer)
            # Again, as the new pins are a part of the fingerprint. They may also have removed this keeper.
            self._look = _fingerprint(self.layer) if self.follow is not None else fingerprint
        train = self._own if self._own is not None else getattr(type(self.layer), TRAIN).__get__(self.layer)
        if not self.is_pinned:
            return train(*args, **kwargs)
        if "mode" in kwargs:
            kwargs = {**kwargs, "mode": False}
        else:
            args = (False, *args[1:])
        result = train(*args, **kwargs) if _takes_mode(train) else nn.Module.train(self.layer, False)
        self.layer.training = False  # a user's own `train` may have set another mode
        return result

    def leave(self) -> None:
        """Remove itself and restore the module's own `train`."""
        self.is_pinned, self.follow = False, None
        if self._own is None:
            vars(self.layer).pop(TRAIN, None)
        else:
            vars(self.layer)[TRAIN] = self._own


class NoReset:
    """Replaces `reset_running_stats` of a pinned layer by a function without effect."""

    def __call__(self) -> None:
        """Change nothing."""


class Scriptable:
    """Returns a copy of a module for `torch.jit.script`: the same tensors and modes, without the hooks of pins."""

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


def _fingerprint(model: nn.Module) -> int:
    """Return a hash of everything that pins depend on; it takes a twentieth of the time of computing the pins."""
    return hash(
        tuple(
            (
                type(layer),
                is_pinned(layer),
                len(forward_pre_hooks(layer)),
                len(forward_hooks(layer)),
                *(parameter.requires_grad for parameter in parameters_of(layer).values() if parameter is not None),
            )
            for layer in model.modules()
        )
    )


def _remove_hooks(layer: nn.Module, keep: frozenset[Callable[..., None]]) -> None:
    """Remove the hooks of pins from a module, except those in `keep`."""
    remove_hooks(layer, lambda hook: hook in PIN_HOOKS and hook not in keep)


def _put(layer: nn.Module, name: str, value: Any, kind: type) -> None:
    """Set the instance attribute `name` of a module where it has none; None: remove it where it is of class `kind`."""
    own = vars(layer).get(name)
    if value is None and isinstance(own, kind):
        del vars(layer)[name]
    elif value is not None and own is None:
        vars(layer)[name] = value


def _takes_mode(train: Callable[..., Any]) -> bool:
    """Return whether `train` takes the mode as an argument, which a user's own may not."""
    if getattr(train, "__func__", None) is nn.Module.train:  # the usual case: inspecting a signature is slow
        return True
    try:
        return bool(inspect.signature(train).parameters)
    except (TypeError, ValueError):
        return True
