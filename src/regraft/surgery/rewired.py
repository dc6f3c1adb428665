"""Networks whose forward is generated from an edited graph."""

import pkgutil
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from regraft.anatomy.dataflow.graph import Flow, capture, capture_widely, containers, tidy
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.paths import is_within
from regraft.anatomy.shape_copies import shared_copy
from regraft.errors import ForwardError
from regraft.freezing.pins import unpin
from regraft.torch_internals import buffers_of, children_of, non_persistent_buffers, parameters_of


@dataclass(frozen=True)
class CompiledForward:
    """The forward of an edited network.

    Attributes:
        code: A Python function `forward(self, …)`.
        names: The modules, functions and constants that the code refers to, by name.
        targets: Paths of the layers and tensors that it uses.
    """

    code: str
    names: dict[str, Any]
    targets: frozenset[str]

    def compiled(self) -> Callable[..., Any]:
        """Return the forward as a function of the network and its inputs."""
        scope = dict(self.names)
        exec(compile(self.code, "<regraft>", "exec"), scope)  # torch.fx wrote it from a graph; no file holds any of it
        return scope["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledForward":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        references = {name: _reference(value) for name, value in self.names.items()}
        return _restored, (self.code, references, self.targets)


class EditedModule(nn.Module):
    """Base class of every network with a generated forward: the original's layers and state, another dataflow.

    Layers keep their paths, classes and forwards. Each network has a subclass of its own, so that its forward has the
    signature of its program.

    Attributes:
        programs: The forward; or two, for evaluation and for training, where the original branches on its mode.
        origin: Name of the original's class.
        mode_switch: Path of the layer whose mode decides between the two.
    """

    programs: tuple[CompiledForward, ...]
    origin: str
    mode_switch: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.origin, self.programs, self.mode_switch), self.__getstate__()


def rewire(
    model: nn.Module,
    opened: Collection[str],
    change: Callable[[Flow], None],
    added: Mapping[str, nn.Module] | None = None,
    *,
    closed: str | None = None,
    respect_pins: bool = False,
    arguments: Arguments | None = None,
) -> EditedModule:
    """Return `model` with another dataflow. The structure of `model` stays as it is, and its weights are shared.

    Args:
        model: Any module.
        opened: Paths of the layers that have to be traced for `change`, see `capture`.
        change: Edits the graph of one mode in place.
        added: New top-level layers by name, which `change` may call.
        closed: Path of the layer that stays a leaf in a second attempt: the first traces as few layers as possible, the
            second, where the first fails, as many as possible.
        respect_pins: See `capture`.
        arguments: See `capture`.

    Raises:
        ModelError: The forward cannot be traced. Nothing was changed.
    """
    try:
        flows = [capture(model, opened, respect_pins=respect_pins, arguments=arguments)]
    except ForwardError:
        wide = [path for path in containers(model) if closed is None or not is_within(path, closed)]
        flow, widely = capture_widely(model, {*opened, *wide}, respect_pins=respect_pins, arguments=arguments)
        if not set(opened) <= set(widely):
            raise  # what has to be looked into is what cannot be traced
        flows, opened = [flow], widely
    if flows[0].mode_switch is not None:
        flows.append(capture(model, opened, training=True, respect_pins=respect_pins, arguments=arguments))
    return rewire_flows(model, flows, change, added)


def rewire_flows(
    model: nn.Module,
    flows: Sequence[Flow],
    change: Callable[[Flow], None],
    added: Mapping[str, nn.Module] | None = None,
) -> EditedModule:
    """Return `model` with the dataflow of these graphs after a change: one for both modes, or evaluation and training.

    See `rewire`. The graphs are changed in place.
    """
    layers = shared_copy(model)
    for name, layer in (added or {}).items():
        layers.add_module(name, layer)
    for flow in flows:
        change(flow)
        tidy(flow.graph, layers.get_submodule)
        flow.graph.lint()
    programs = tuple(_program(flow.graph) for flow in flows)
    if all(program.code == programs[0].code for program in programs):  # the branch was in the part that is gone
        programs = programs[:1]
    rewired = _empty(getattr(model, "origin", type(model).__name__), programs, flows[0].mode_switch or "")
    own = {name: vars(rewired)[name] for name in EditedModule.__annotations__}
    unpin(layers)  # whether the whole network is frozen is computed again
    rewired.__dict__.update({**vars(layers), **own})
    for flow in flows:
        for name, tensor in flow.constants.items():
            setattr(rewired, name, tensor)
    if hasattr(model, "preprocessing"):  # a class attribute, which describes the images that the network takes
        rewired.__dict__["preprocessing"] = model.preprocessing
    return rewired


def prune(rewired: EditedModule) -> list[str]:
    """Delete from a network, in place, the layers and tensors that no program uses, and return their paths."""
    return _pruned(rewired, "", set().union(*(program.targets for program in rewired.programs)))


def unused_names(model: nn.Module, stem: str, count: int) -> list[str]:
    """Return names for new top-level layers: the stem with the next numbers that are free.

    >>> unused_names(nn.ModuleDict({"appended_1": nn.ReLU()}), "appended", 2)
    ['appended_2', 'appended_3']
    """
    number = 1
    while any(name.startswith(f"{stem}_{number}") for name in dir(model)):
        number += 1
    return [f"{stem}_{number + position}" for position in range(count)]


# Pickled networks refer to `_empty` and `_restored` by name: renaming them breaks files that exist.


def _pruned(layer: nn.Module, path: str, used: set[str]) -> list[str]:
    gone = []
    for slots in (parameters_of(layer), buffers_of(layer), children_of(layer)):
        for name in list(slots):
            inner = f"{path}.{name}".lstrip(".")
            if inner in used or name in non_persistent_buffers(layer):  # which a layer's own methods may read
                continue
            child = children_of(layer).get(name)
            if child is not None and any(is_within(target, inner) for target in used):
                gone += _pruned(child, inner, used)
            else:
                del slots[name]
                gone.append(inner)
    return gone


def _empty(origin: str, programs: tuple[CompiledForward, ...], mode_switch: str) -> EditedModule:
    """Create a network without layers, whose forward is that of the programs."""
    forwards = [program.compiled() for program in programs]
    forward = forwards[0] if len(forwards) == 1 else _by_mode(*forwards, mode_switch=mode_switch)
    rewired = type(f"Edited{origin}", (EditedModule,), {"forward": forward, "__module__": __name__})()
    rewired.programs, rewired.origin, rewired.mode_switch = programs, origin, mode_switch
    return rewired


def _by_mode(evaluate: Callable[..., Any], train: Callable[..., Any], *, mode_switch: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (train if layers_mode(self) else evaluate)(self, *args, **kwargs)

    def layers_mode(self: nn.Module) -> bool:
        try:
            return self.get_submodule(mode_switch).training
        except AttributeError:  # it was cut off
            return self.training

    forward.__wrapped__ = evaluate  # pyright: ignore[reportFunctionMemberAccess]  # whose signature it has
    return forward


def _program(graph: fx.Graph) -> CompiledForward:
    python = graph.python_code("self")
    names = {name: value for name, value in python.globals.items() if re.search(rf"\b{name}\b", python.src)}
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return CompiledForward(python.src.strip() + "\n", names, frozenset(targets))


def _reference(value: Any) -> tuple[str, Any]:
    """Return where an object that a program refers to can be imported from, or the object itself where nowhere."""
    if isinstance(value, type(re)):
        return "module", value.__name__
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return ("object", f"{home}:{name}") if home and name else ("value", value)


def _restored(code: str, references: dict[str, tuple[str, Any]], targets: frozenset[str]) -> CompiledForward:
    return CompiledForward(code, {name: _imported(*reference) for name, reference in references.items()}, targets)


def _imported(kind: str, reference: Any) -> Any:
    return reference if kind == "value" else pkgutil.resolve_name(reference)
