"""The layers of a network as the `__init__` of a class: the same dotted paths, written as constructor calls."""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import groupby
from keyword import iskeyword
from typing import Any

import torch
from torch import nn

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.paths import parent_and_name
from regraft.errors import EditError
from regraft.freezing.hold import PIN_HOOKS
from regraft.surgery.codegen.constructors import as_builtin, constructor, holder_of, is_timm_leaf
from regraft.surgery.codegen.literals import Constants, ImportTable

HELPERS = {
    "block": '''
def block(**parts: nn.Module | torch.Tensor) -> nn.Module:
    """Return a module that holds these layers, parameters and buffers."""
    return joined(nn.Module(), **parts)
''',
    "joined": '''
def joined(holder: nn.Module, **parts: nn.Module | torch.Tensor) -> nn.Module:
    """Put layers, parameters and buffers into a module, and return it."""
    for name, part in parts.items():
        setattr(holder, name, part)
    return holder
''',
}


class Layers:
    """Which layers of a network are written as one constructor call, and which are looked into.

    Attributes:
        closed: Constructor calls by path; an empty text for a Sequential made of nothing but such layers.
        opened: Paths of the others, the network itself left out.
        reasons: Why a layer is not written as one call although its class might be, by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.closed: dict[str, str] = {}
        self.opened: list[str] = []
        self.reasons: dict[str, str] = {}
        for name, child in model.named_children():
            self._look(child, name)

    def is_closed(self, path: str) -> bool:
        """Return whether a layer is written as one call, or lies within one that is."""
        return any(part in self.closed for part in [*ancestors(path), path])

    def _look(self, layer: nn.Module, path: str) -> None:
        text = self._call(layer, path)
        if text is not None:
            self.closed[path] = text
            return
        self.opened.append(path)
        for name, child in layer.named_children():
            self._look(child, f"{path}.{name}")
        inner = [f"{path}.{name}" for name in layer._modules]
        is_chain = isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward
        if is_chain and inner and _own_state(layer) == [] and all(part in self.closed for part in inner):
            self.closed[path] = ""
            self.opened.remove(path)

    def _call(self, layer: nn.Module, path: str) -> str | None:
        builtin = as_builtin(layer)
        if "forward" in vars(layer) or (builtin is None and not is_timm_leaf(layer)):
            return None
        try:
            return constructor(layer if builtin is None else builtin)
        except EditError as error:
            self.reasons[path] = str(error)
            return None


class InitWriter:
    """Writes the `__init__`, and the expressions for what it makes.

    Args:
        model: The network.
        layers: Which of its layers are written how.
        targets: Paths of the layers and tensors that its forward uses.
        constants: Tensors that the forward makes out of nothing, by the name under which it reads them.
        names: Where classes get their names from.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        targets: Collection[str],
        constants: dict[str, torch.Tensor],
        names: ImportTable,
    ) -> None:
        self._model, self._layers, self._targets, self._names = model, layers, set(targets), names
        self._made_here = constants
        self._kept = self._choose_kept()
        slots = [*model._modules.items()]
        for path, layer in model.named_modules():
            slots += [(f"{path}.{name}", child) for name, child in layer._modules.items() if path]
        places = Counter(id(child) for path, child in slots if path in self._kept)
        self._shared = {key for key, count in places.items() if count > 1}
        self._variables: dict[int, str] = {}
        self._written: set[int] = set()
        self._ahead: list[str] = []
        self.constants = Constants()
        self.helpers: set[str] = set()

    def lines(self) -> list[str]:
        """Write the body of the `__init__`."""
        made = []
        for name, child in self._model._modules.items():
            if child is not None and name in self._kept:
                text = self._part(child, name)
                made.append(f"self.{name} = {text}" if _is_name(name) else f'self.add_module("{name}", {text})')
        return [*self._ahead, *made, *self._tensors(), *self._ties()]

    def attribute(self, path: str) -> str:
        """Return the expression for a layer or a tensor at a path."""
        if path in self._made_here:
            return f"self.{_constant_name(path)}"
        text, owner = "self", self._model
        parts = path.split(".")
        for position, part in enumerate(parts):
            is_layer = part in owner._modules
            before = ".".join(parts[:position])
            if _is_name(part):
                text += f".{part}"
            elif is_layer and self._is_list(owner, before):
                text += f"[{part}]"
            elif is_layer and self._is_dict(owner, before):
                text += f'["{part}"]'
            else:
                text += f'.{"get_submodule" if is_layer else "get_parameter"}("{part}")'
            owner = owner._modules[part] if is_layer else owner
            if owner is None:
                raise EditError(f"'{path}' is no layer")
        return text

    def _choose_kept(self) -> set[str]:
        """Choose the layers that hold something that the forward or the state dict needs."""
        kept: set[str] = set()
        for path, layer in self._model.named_modules(remove_duplicate=False):
            is_needed = any(tensor is not None for tensor in layer._parameters.values()) or bool(_persistent(layer))
            if path and (is_needed or path in self._targets):
                inside = [f"{path}.{name}" for name, _ in layer.named_modules(remove_duplicate=False) if name]
                kept |= {*ancestors(path), path, *(inside if self._layers.is_closed(path) else ())}
        for target in self._targets:
            owner = parent_and_name(target)[0]
            kept |= {*ancestors(owner), owner} if owner else set()
        return kept

    def _part(self, layer: nn.Module, path: str) -> str:
        if id(layer) in self._variables:
            return self._variables[id(layer)]
        text = self._call(layer, path)
        if id(layer) in self._shared:
            number = len(self._variables) + 1
            self._variables[id(layer)] = name = f"shared{number}"
            self._ahead.append(f"{name} = {text}")
            return name
        return text

    def _call(self, layer: nn.Module, path: str) -> str:
        first = next((name for name, other in self._model.named_modules() if other is layer), path)
        call = self._layers.closed.get(first)
        if call:
            if not call.startswith("nn."):
                self._names.of(type(layer))
            return call
        if path not in self._kept:
            return "nn.Identity()"
        parts = {name: child for name, child in layer._modules.items() if child is not None}
        if self._is_list(layer, path):
            return self._list(layer, path, parts, is_chain=call == "")
        kept = {name: child for name, child in parts.items() if f"{path}.{name}" in self._kept}
        texts = {name: self._part(child, f"{path}.{name}") for name, child in kept.items()}
        if self._is_dict(layer, path):
            return "nn.ModuleDict({" + ", ".join(f'"{name}": {text}' for name, text in texts.items()) + "})"
        if call == "":
            texts = {name: self._part(child, f"{path}.{name}") for name, child in parts.items()}
            pairs = ", ".join(f'("{name}", {text})' for name, text in texts.items())
            self._names.imports.add("from collections import OrderedDict")
            return f"nn.Sequential(OrderedDict([{pairs}]))"
        holder = self._holder(layer)
        tensors = self._tensors_of(layer, path, held=bool(holder))
        if all(map(_is_name, tensors)):
            texts = tensors | texts
            self._written.add(id(layer))
        inner = ", ".join(f"{name}={text}" for name, text in texts.items())
        if not holder:
            self.helpers |= {"block", "joined"} if inner else set()
            return f"block({inner})" if inner else "nn.Module()"
        self.helpers |= {"joined"} if inner else set()
        return f"joined({holder}, {inner})" if inner else holder

    def _list(self, layer: nn.Module, path: str, parts: dict[str, nn.Module], *, is_chain: bool) -> str:
        last = max((int(name) for name in parts if is_chain or f"{path}.{name}" in self._kept), default=-1)
        texts = [self._part(child, f"{path}.{name}") for name, child in parts.items() if int(name) <= last]
        runs: list[str] = []
        for text, same in groupby(texts):
            count = len(list(same))
            is_run = count > 2 or (count == 2 and len(text) > 80)
            can_repeat = is_run and not any(name in text for name in self._variables.values())
            runs += [f"*({text} for _ in range({count}))"] if can_repeat else [text] * count
        if is_chain:
            return f"nn.Sequential({', '.join(runs)})"
        if len(runs) == 1 and runs[0].startswith("*("):
            return f"nn.ModuleList({runs[0][2:-1]})"
        return f"nn.ModuleList([{', '.join(runs)}])"

    def _holder(self, layer: nn.Module) -> str:
        """Write a layer of `torch.nn` whose parameters are those of a class derived from it; empty where none fits."""
        view = holder_of(layer)
        if view is None:
            return ""
        try:
            return constructor(view)
        except EditError:
            return ""

    def _tensors(self) -> Iterator[str]:
        """Write the tensors of the layers that are no plain blocks: the network itself, lists."""
        for path, layer in self._model.named_modules():
            if self._layers.is_closed(path) or (path and path not in self._kept) or id(layer) in self._written:
                continue
            owner = self.attribute(path) if path else "self"
            for name, text in self._tensors_of(layer, path, held=bool(path and self._holder(layer))).items():
                yield f"{owner}.{name} = {text}" if _is_name(name) else f'{owner}.register_parameter("{name}", {text})'
        for name, tensor in self._made_here.items():
            yield f"self.{_constant_name(name)} = {self._constant(tensor, 'constant')}"

    def _tensors_of(self, layer: nn.Module, path: str, *, held: bool) -> dict[str, str]:
        """Write the tensors of a layer that is looked into, without those that its holder makes if it is `held`."""
        found: dict[str, str] = {}
        for name, tensor in {} if held else layer._parameters.items():
            if tensor is not None:
                found[name] = _fresh_parameter(tensor)
        for name, tensor in {} if held else _persistent(layer).items():
            found[name] = f"nn.Buffer(torch.zeros({_shape(tensor)}{_dtype(tensor)}))"
        others = {name: layer._buffers.get(name) for name in layer._non_persistent_buffers_set}
        for name, tensor in [*others.items(), *vars(layer).items()]:
            full = f"{path}.{name}".lstrip(".")
            if isinstance(tensor, torch.Tensor) and full in self._targets:
                found[name] = self._constant(tensor, full)
        return found

    def _constant(self, tensor: torch.Tensor, hint: str) -> str:
        return f"nn.Buffer({self.constants.of(tensor, hint)}, persistent=False)"

    def _ties(self) -> Iterator[str]:
        """Write which parameters and buffers are the same in several layers."""
        first: dict[int, tuple[nn.Module, str]] = {}
        for path, layer in self._model.named_modules():
            if path and path not in self._kept:
                continue
            for name, tensor in [*layer._parameters.items(), *_persistent(layer).items()]:
                if tensor is None:
                    continue
                full = f"{path}.{name}".lstrip(".")
                if id(tensor) not in first:
                    first[id(tensor)] = (layer, full)
                elif first[id(tensor)][0] is not layer or first[id(tensor)][1] != full:
                    yield f"{self.attribute(full)} = {self.attribute(first[id(tensor)][1])}"

    def _is_list(self, layer: nn.Module, path: str) -> bool:
        names = [name for name, child in layer._modules.items() if child is not None]
        return (
            bool(path)
            and bool(names)
            and names == [str(number) for number in range(len(names))]
            and not self._holder(layer)
        )

    def _is_dict(self, layer: nn.Module, path: str) -> bool:
        own = isinstance(layer, nn.ModuleDict) or not all(map(_is_name, layer._modules))
        return bool(path) and own and self._layers.closed.get(path) is None and not self._holder(layer)


def require_no_hooks(model: nn.Module) -> None:
    """Refuse a network in which hooks take part in the forward.

    Raises:
        EditError: A layer has one; the message names it. Those by which frozen layers stay in evaluation do not count.
    """
    for path, layer in model.named_modules():
        hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
        for hook in hooks:
            if hook not in PIN_HOOKS:
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise EditError(
                    f"'{path}' ({type(layer).__name__}) carries a forward hook ({name}), which a source file would not "
                    "run. Remove the hook first; for weight norm and pruning torch.nn.utils has functions that do. "
                    "Nothing was written."
                )


def _own_state(layer: nn.Module) -> list[Any]:
    return [tensor for tensor in (*layer._parameters.values(), *layer._buffers.values()) if tensor is not None]


def _persistent(layer: nn.Module) -> dict[str, torch.Tensor]:
    skipped = layer._non_persistent_buffers_set
    return {name: tensor for name, tensor in layer._buffers.items() if tensor is not None and name not in skipped}


def _fresh_parameter(tensor: torch.Tensor) -> str:
    flag = "" if tensor.is_floating_point() or tensor.is_complex() else ", requires_grad=False"
    return f"nn.Parameter(torch.empty({_shape(tensor)}{_dtype(tensor)}){flag})"


def _shape(tensor: torch.Tensor) -> str:
    return ", ".join(map(str, tensor.shape)) or "()"


def _dtype(tensor: torch.Tensor) -> str:
    return "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"


def _constant_name(path: str) -> str:
    return path.removeprefix("_tensor_")


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text) and not text.startswith("__")
