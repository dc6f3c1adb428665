"""Write the layers of a network as the `__init__` of a class: constructor calls under the same dotted paths."""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import groupby
from keyword import iskeyword

import torch
from torch import nn

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.paths import parent_and_name
from regraft.errors import EditError
from regraft.freezing.hold import PIN_HOOKS
from regraft.surgery.codegen.constructors import as_builtin, constructor, holder_of, is_timm_leaf
from regraft.surgery.codegen.literals import Constants, ImportTable
from regraft.torch_internals import (
    buffers_of,
    children_of,
    forward_hooks,
    forward_pre_hooks,
    non_persistent_buffers,
    parameters_of,
)

# Functions that a written file may contain. They are output: their names and texts stand in users' files.
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
    """Splits the layers of a network into leaves, written as one constructor call each, and traced layers.

    Attributes:
        leaves: Constructor calls by path; an empty text for a Sequential that contains only leaves.
        traced: Paths of the others, without the network itself.
        reasons: Why a layer of a class that could be written as one call is not, by path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.leaves: dict[str, str] = {}
        self.traced: list[str] = []
        self.reasons: dict[str, str] = {}
        for name, child in model.named_children():
            self._classify(child, name)

    def is_in_leaf(self, path: str) -> bool:
        """Return whether a layer is a leaf, or lies within one."""
        return any(part in self.leaves for part in [*ancestors(path), path])

    def _classify(self, layer: nn.Module, path: str) -> None:
        text = self._call(layer, path)
        if text is not None:
            self.leaves[path] = text
            return
        self.traced.append(path)
        for name, child in layer.named_children():
            self._classify(child, f"{path}.{name}")
        # A plain chain of leaves becomes one node of the graph, so that the forward calls it in one line. Its children
        # are decided before, as they have to be leaves themselves.
        inner = [f"{path}.{name}" for name in children_of(layer)]
        is_chain = isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward
        has_state = any(tensor is not None for tensor in (*parameters_of(layer).values(), *buffers_of(layer).values()))
        if is_chain and inner and not has_state and all(part in self.leaves for part in inner):
            self.leaves[path] = ""
            self.traced.remove(path)

    def _call(self, layer: nn.Module, path: str) -> str | None:
        """Write the constructor call of a leaf; None where the layer has to be traced."""
        builtin = as_builtin(layer)
        # A `forward` on the instance replaces the one of the class, which a constructor call would bring back.
        if "forward" in vars(layer) or (builtin is None and not is_timm_leaf(layer)):
            return None
        try:
            return constructor(layer if builtin is None else builtin)
        except EditError as error:
            self.reasons[path] = str(error)
            return None


class InitWriter:
    """Writes the `__init__`, and the expressions for the layers and tensors that it creates.

    Args:
        model: The network.
        layers: Its leaves and traced layers.
        targets: Paths of the layers and tensors that its forward uses.
        constants: Tensors that the forward creates without inputs, by the name under which it reads them.
        names: Gives classes their names, and collects the imports.
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
        self._graph_constants = constants
        self._kept = self._choose_kept()
        # Count the places of each layer, by identity: one that stands in several is made once, ahead of the others.
        # `named_modules` visits a shared parent once, so a layer that is shared only through it does not count twice.
        places = Counter(
            id(child)
            for path, layer in model.named_modules()
            for name, child in children_of(layer).items()
            if f"{path}.{name}".lstrip(".") in self._kept
        )
        self._shared = {key for key, count in places.items() if count > 1}
        self._variables: dict[int, str] = {}
        self._written: set[int] = set()
        self._ahead: list[str] = []
        self.constants = Constants()
        self.helpers: set[str] = set()

    def lines(self) -> list[str]:
        """Write the body of the `__init__`."""
        statements = []
        for name, child in children_of(self._model).items():
            if child is not None and name in self._kept:
                text = self._part(child, name)
                statements.append(f"self.{name} = {text}" if _is_name(name) else f'self.add_module("{name}", {text})')
        # Shared layers first, as the others use their variables; tensors and ties last, as they need all layers.
        return [*self._ahead, *statements, *self._tensors(), *self._ties()]

    def attribute(self, path: str) -> str:
        """Return the expression for a layer or a tensor at a path."""
        if path in self._graph_constants:
            return f"self.{_constant_name(path)}"
        text, owner = "self", self._model
        parts = path.split(".")
        for position, part in enumerate(parts):
            is_layer = part in children_of(owner)
            before = ".".join(parts[:position])
            # Names that are no identifiers ("0", "class") need another form of access, by what holds them in the file.
            if _is_name(part):
                text += f".{part}"
            elif is_layer and self._is_list(owner, before):
                text += f"[{part}]"
            elif is_layer and self._is_dict(owner, before):
                text += f'["{part}"]'
            else:
                text += f'.{"get_submodule" if is_layer else "get_parameter"}("{part}")'
            owner = children_of(owner)[part] if is_layer else owner
            if owner is None:
                raise EditError(f"'{path}' is no layer")
        return text

    def _choose_kept(self) -> set[str]:
        """Return the paths of the layers that the forward or the state dict needs, with all layers around them."""
        kept: set[str] = set()
        for path, layer in self._model.named_modules(remove_duplicate=False):
            is_needed = any(tensor is not None for tensor in parameters_of(layer).values()) or bool(_persistent(layer))
            if path and (is_needed or path in self._targets):
                # A leaf is made whole by its constructor, so all layers in it exist as well.
                inside = [f"{path}.{name}" for name, _ in layer.named_modules(remove_duplicate=False) if name]
                kept |= {*ancestors(path), path, *(inside if self._layers.is_in_leaf(path) else ())}
        for target in self._targets:
            owner = parent_and_name(target)[0]
            kept |= {*ancestors(owner), owner} if owner else set()
        return kept

    def _part(self, layer: nn.Module, path: str) -> str:
        """Write the expression for a layer: its constructor call, or its variable where it is shared."""
        if id(layer) in self._variables:
            return self._variables[id(layer)]
        text = self._call(layer, path)
        if id(layer) in self._shared:
            # Numbered after the call is written, as writing it may name shared layers inside of this one.
            number = len(self._variables) + 1
            self._variables[id(layer)] = name = f"shared{number}"
            self._ahead.append(f"{name} = {text}")
            return name
        return text

    def _call(self, layer: nn.Module, path: str) -> str:
        """Write the call that makes a layer with everything in it."""
        # By the first path of a layer: `Layers` lists it under no second name in the same parent.
        first = next((name for name, module in self._model.named_modules() if module is layer), path)
        call = self._layers.leaves.get(first)
        if call:
            if not call.startswith("nn."):  # a class of timm's, which needs an import
                self._names.of(type(layer))
            return call
        if path not in self._kept:  # a filler, so that the numbers of the layers after it in a list stay
            return "nn.Identity()"
        parts = {name: child for name, child in children_of(layer).items() if child is not None}
        if self._is_list(layer, path):
            return self._list(layer, path, parts, is_chain=call == "")
        kept = {name: child for name, child in parts.items() if f"{path}.{name}" in self._kept}
        texts = {name: self._part(child, f"{path}.{name}") for name, child in kept.items()}
        if self._is_dict(layer, path):
            return "nn.ModuleDict({" + ", ".join(f'"{name}": {text}' for name, text in texts.items()) + "})"
        # A Sequential whose layers have names of their own, which calls all of them: also those that hold no tensor.
        if call == "":
            texts = {name: self._part(child, f"{path}.{name}") for name, child in parts.items()}
            pairs = ", ".join(f'("{name}", {text})' for name, text in texts.items())
            self._names.imports.add("from collections import OrderedDict")
            return f"nn.Sequential(OrderedDict([{pairs}]))"
        holder = self._holder(layer)
        tensors = self._tensors_of(layer, path, held=bool(holder))
        # Names of tensors become keywords of the call; where one cannot, `_tensors` writes statements instead.
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
        """Write a Sequential (`is_chain`) or ModuleList, with equal calls in a row as a loop."""
        # The end of a list may be cut off where nothing needs it; of a chain each layer is called.
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
        """Write the call of a traced layer's base class in `torch.nn`, which makes its parameters; empty: none fits."""
        view = holder_of(layer)
        try:
            return constructor(view) if view is not None else ""
        except EditError:
            return ""

    def _tensors(self) -> Iterator[str]:
        """Write the tensors of the layers whose call does not make them: those of the network itself and of lists."""
        for path, layer in self._model.named_modules():
            if self._layers.is_in_leaf(path) or (path and path not in self._kept) or id(layer) in self._written:
                continue
            owner = self.attribute(path) if path else "self"
            for name, text in self._tensors_of(layer, path, held=bool(path and self._holder(layer))).items():
                yield f"{owner}.{name} = {text}" if _is_name(name) else f'{owner}.register_parameter("{name}", {text})'
        for name, tensor in self._graph_constants.items():
            yield f"self.{_constant_name(name)} = {self._constant(tensor, 'constant')}"

    def _tensors_of(self, layer: nn.Module, path: str, *, held: bool) -> dict[str, str]:
        """Write the tensors of a traced layer by name; if it is `held`, without those that its holder makes."""
        texts: dict[str, str] = {}
        for name, tensor in {} if held else parameters_of(layer).items():
            if tensor is not None:
                texts[name] = _fresh_parameter(tensor)
        for name, tensor in {} if held else _persistent(layer).items():
            texts[name] = f"nn.Buffer(torch.zeros({_shape(tensor)}{_dtype(tensor)}))"
        # No state dict holds these, so their values stand in the file, if the forward reads them.
        unsaved = {name: buffers_of(layer).get(name) for name in non_persistent_buffers(layer)}
        for name, tensor in [*unsaved.items(), *vars(layer).items()]:
            full = f"{path}.{name}".lstrip(".")
            if isinstance(tensor, torch.Tensor) and full in self._targets:
                texts[name] = self._constant(tensor, full)
        return texts

    def _constant(self, tensor: torch.Tensor, hint: str) -> str:
        return f"nn.Buffer({self.constants.of(tensor, hint)}, persistent=False)"

    def _ties(self) -> Iterator[str]:
        """Write assignments for the parameters and buffers that several layers share."""
        # `named_modules` gives a layer at several paths once: its tensors are shared without an assignment.
        first: dict[int, tuple[nn.Module, str]] = {}
        for path, layer in self._model.named_modules():
            if path and path not in self._kept:
                continue
            for name, tensor in [*parameters_of(layer).items(), *_persistent(layer).items()]:
                if tensor is None:
                    continue
                full = f"{path}.{name}".lstrip(".")
                owner, source = first.setdefault(id(tensor), (layer, full))
                if owner is not layer or source != full:
                    yield f"{self.attribute(full)} = {self.attribute(source)}"

    def _is_list(self, layer: nn.Module, path: str) -> bool:
        """Return whether a layer is written as a ModuleList or Sequential: its children are numbered from 0."""
        names = [name for name, child in children_of(layer).items() if child is not None]
        return (
            bool(path)
            and bool(names)
            and names == [str(number) for number in range(len(names))]
            and not self._holder(layer)
        )

    def _is_dict(self, layer: nn.Module, path: str) -> bool:
        """Return whether a layer is written as a ModuleDict, as the names of its children are no keywords of a call."""
        is_needed = isinstance(layer, nn.ModuleDict) or not all(map(_is_name, children_of(layer)))
        return bool(path) and is_needed and self._layers.leaves.get(path) is None and not self._holder(layer)


def require_no_hooks(model: nn.Module) -> None:
    """Refuse a network in which hooks take part in the forward.

    Raises:
        EditError: A layer has one; the message names it. The hooks of pins are ignored.
    """
    for path, layer in model.named_modules():
        for hook in (*forward_pre_hooks(layer).values(), *forward_hooks(layer).values()):
            if hook not in PIN_HOOKS:
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise EditError(
                    f"'{path}' ({type(layer).__name__}) carries a forward hook ({name}), which a source file would not "
                    "run. Remove the hook first; for weight norm and pruning torch.nn.utils has functions that do. "
                    "Nothing was written."
                )


def _persistent(layer: nn.Module) -> dict[str, torch.Tensor]:
    skipped = non_persistent_buffers(layer)
    return {name: tensor for name, tensor in buffers_of(layer).items() if tensor is not None and name not in skipped}


def _fresh_parameter(tensor: torch.Tensor) -> str:
    # torch refuses gradients of whole numbers, and a parameter asks for one unless told otherwise.
    flag = "" if tensor.is_floating_point() or tensor.is_complex() else ", requires_grad=False"
    return f"nn.Parameter(torch.empty({_shape(tensor)}{_dtype(tensor)}){flag})"


def _shape(tensor: torch.Tensor) -> str:
    return ", ".join(map(str, tensor.shape)) or "()"  # a scalar: `torch.empty()` without a shape is an error


def _dtype(tensor: torch.Tensor) -> str:
    return "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"


def _constant_name(path: str) -> str:
    return path.removeprefix("_tensor_")  # `_tensor_constant0`, as torch.fx names it


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text) and not text.startswith("__")
