"""A graph as the lines of a Python function that a person would like to read.

Values are called x, y, z, …; a value that is used no more gives its name to the one that is computed from it. What is
cheap and used once, such as a size, stands where it is used. A comment names the block whose forward the lines are.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg

from regraft.anatomy.dataflow.graph import LAYER, Flow, ancestors, tidy
from regraft.errors import EditError
from regraft.surgery.codegen.literals import ImportTable, quoted

BLOCK = 5  # lines that make a block worth a comment
LOAD = 4  # operations that stand within one line besides its own
POOL = [*"xyzuvwpqrst", *"abcdefghij"]
BINARY = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"}
BINARY |= {"matmul": "@", "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>"}
BINARY |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
STRENGTH = {"**": 7, "*": 5, "/": 5, "//": 5, "%": 5, "@": 5, "+": 4, "-": 4, "<<": 3, ">>": 3, "&": 2, "^": 1, "|": 0}
UNARY = {"neg": "-", "invert": "~", "pos": "+"}
IN_PLACE = {f"i{name.strip('_')}": sign for name, sign in BINARY.items() if name not in ("eq", "ne", "lt", "gt")}
CHEAP_METHODS = frozenset({"size", "dim", "numel", "ndimension"})


@dataclass(frozen=True)
class Choice:
    """A plain value that depends on the mode of a layer."""

    path: str
    train: Any
    evaluate: Any


def simplify(flow: Flow, model: nn.Module) -> None:
    """Take out of a graph, in place, what computes nothing: identity layers, checks, values that nobody uses."""
    for node in list(flow.graph.nodes):
        is_identity = node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.Identity
        if is_identity and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            flow.graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch._assert and not node.users:
            flow.graph.erase_node(node)
    tidy(flow.graph, model.get_submodule)


def merged(evaluate: Flow, train: Flow) -> bool:
    """Let the first of two graphs serve both modes, in place, where they differ in plain values alone; else do nothing.

    Returns:
        Whether it serves both now.
    """
    ours, theirs = list(evaluate.graph.nodes), list(train.graph.nodes)
    if len(ours) != len(theirs):
        return False
    same = dict(zip(theirs, ours, strict=True))
    arguments = []
    for own, other in zip(ours, theirs, strict=True):
        if (own.op, own.target) != (other.op, other.target):
            return False
        path = _block(own)
        try:
            arguments.append(
                (own, _either(own.args, other.args, same, path), _either(own.kwargs, other.kwargs, same, path))
            )
        except _DifferError:
            return False
    for own, args, kwargs in arguments:
        own._update_args_kwargs(args, kwargs)
    return True


class ForwardWriter:
    """Writes the graph of one mode.

    Args:
        flow: The graph, simplified.
        attribute: Returns the expression for a layer or tensor at a path.
        names: Where functions and classes get their names from.
        model: The network, whose class names the comments say.
    """

    def __init__(self, flow: Flow, attribute: Callable[[str], str], names: ImportTable, model: nn.Module) -> None:
        self._graph, self._attribute, self._names, self._model = flow.graph, attribute, names, model
        self._order = {node: position for position, node in enumerate(flow.graph.nodes)}
        self._inlined = self._choose_inlined()
        self._variables: dict[fx.Node, str] = {}
        self._free: set[str] = set()
        self._used: set[str] = set()
        self.inputs = [str(node.target) for node in flow.graph.nodes if node.op == "placeholder"]

    def lines(self) -> list[str]:
        """Write the body of the function."""
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._variables[node] = str(node.target)
                self._used.add(str(node.target))
        last = self._last_uses()
        statements = [node for node in self._graph.nodes if node.op != "placeholder" and node not in self._inlined]
        headings = self._headings(statements)
        written: list[str] = []
        for node in statements:
            if node in headings:
                written += ["", headings[node]] if written else [headings[node]]
            dying = [source for source in self._sources(node) if last[source] is node]
            written += self._statement(node, dying)
        if len(written) > 1 and written[-2].startswith(f"{written[-1].removeprefix('return ')} = "):
            written[-2:] = ["return " + written[-2].partition(" = ")[2]]
        return written

    def _statement(self, node: fx.Node, dying: list[fx.Node]) -> Iterator[str]:
        if node.op == "output":
            yield f"return {self._text(node.args[0])}"
            return
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name == "setitem":
            yield f"{self._operand(node.args[0])}[{self._index(node.args[1])}] = {self._text(node.args[2])}"
            self._release(dying, None)
            return
        if node.op == "call_function" and name in IN_PLACE and _is_operator(node):
            changed, other = self._text(node.args[0]), self._text(node.args[1])
            variable = self._release([source for source in dying if source is node.args[0]], node)
            self._release([source for source in dying if source is not node.args[0]], None)
            if variable != changed:
                yield f"{variable} = {changed}"
            yield f"{variable} {IN_PLACE[name]}= {other}"
            return
        expression = self._expression(node)
        variable = self._release(dying, node) if node.users else None
        if variable is None:
            self._release(dying, None)
        yield f"{variable} = {expression}" if variable else expression

    def _release(self, dying: list[fx.Node], node: fx.Node | None) -> str:
        """Free the names of values that are used no more, and name a new one."""
        freed = [self._variables[source] for source in dying]
        freed = sorted((name for name in freed if name in POOL), key=POOL.index)
        self._free.update(freed)
        if node is None:
            return ""
        order = [*freed, *sorted(self._free, key=POOL.index), *POOL, *(f"value{n}" for n in range(len(self._order)))]
        variable = next(name for name in order if name in self._free or name not in self._used)
        self._free.discard(variable)
        self._used.add(variable)
        self._variables[node] = variable
        return variable

    def _expression(self, node: fx.Node) -> str:
        args, kwargs = node.args, node.kwargs
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            return f"{self._attribute(str(node.target))}({self._arguments(args, kwargs)})"
        if node.op == "call_method":
            return f"{self._operand(args[0])}.{node.target}({self._arguments(args[1:], kwargs)})"
        if node.target is getattr and isinstance(args[1], str) and args[1].isidentifier():
            return f"{self._operand(args[0])}.{args[1]}"
        name = getattr(node.target, "__name__", "")
        if _is_operator(node) and not kwargs:
            if name == "getitem":
                return f"{self._operand(args[0])}[{self._index(args[1])}]"
            if name in BINARY:
                sign = BINARY[name]
                return f"{self._operand(args[0], sign)} {sign} {self._operand(args[1], sign, is_second=True)}"
            if name in UNARY:
                return f"{UNARY[name]}{self._operand(args[0])}"
        return f"{self._names.of(node.target)}({self._arguments(args, kwargs)})"

    def _arguments(self, args: Any, kwargs: Any) -> str:
        named = (f"{name}={self._text(value)}" for name, value in kwargs.items())
        return ", ".join([*(self._text(value) for value in args), *named])

    def _operand(self, value: Any, around: str = "", *, is_second: bool = False) -> str:
        """Write a value that something is done with, in brackets where these are needed, or help the reader."""
        text = self._text(value)
        if isinstance(value, fx.Node) and value in self._inlined and _is_operator(value):
            name = getattr(value.target, "__name__", "")
            own, outer = 6 if name in UNARY else STRENGTH.get(BINARY.get(name, ""), -1), STRENGTH.get(around, 9)
            is_loose = own < outer or (own == outer and (is_second or (own == 5 and BINARY[name] != around)))
            return text if name == "getitem" or not is_loose else f"({text})"
        is_negative = isinstance(value, (int, float)) and text.startswith("-") and around in ("", "**")
        return f"({text})" if is_negative or isinstance(value, complex) else text

    def _index(self, value: Any) -> str:
        parts = value if isinstance(value, tuple) and value else (value,)
        texts = [self._slice(part) if isinstance(part, slice) else self._text(part) for part in parts]
        return ", ".join(texts) + ("," if isinstance(value, tuple) and len(value) == 1 else "")

    def _slice(self, value: slice) -> str:
        start, stop = ("" if end is None else self._text(end) for end in (value.start, value.stop))
        return f"{start}:{stop}" + ("" if value.step is None else f":{self._text(value.step)}")

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._expression(value) if value in self._inlined else self._variables[value]
        if isinstance(value, Choice):
            training = self._attribute(f"{value.path}.training".lstrip("."))
            return f"({self._text(value.train)} if {training} else {self._text(value.evaluate)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._names.of(type(value))}({', '.join(map(self._text, value))})"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._text, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._text(key)}: {self._text(inner)}" for key, inner in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        return self._plain(value)

    def _plain(self, value: Any) -> str:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            return f'float("{value}")'
        if value is ...:
            return "..."
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if value is None or type(value) in (bool, int, float, complex, str, bytes, range):
            return quoted(value)
        if callable(value):
            return self._names.of(value)
        raise EditError(f"its forward holds a {type(value).__module__}.{type(value).__name__}, no plain value")

    def _choose_inlined(self) -> set[fx.Node]:
        """Choose the nodes that stand where they are used: tensors of the network, and what is cheap and used once."""
        inlined = {node for node in self._graph.nodes if node.op == "get_attr"}
        loads: Counter[fx.Node] = Counter()
        for node in reversed(list(self._graph.nodes)):
            if node in inlined or not _is_cheap(node) or len(node.users) != 1:
                continue
            (user,) = node.users
            uses = [source for source in _occurrences(user) if source is node]
            end = self._statement_of(user, inlined)
            between = [other for other in self._order if self._order[node] < self._order[other] < self._order[end]]
            if len(uses) == 1 and loads[end] < LOAD and all(other in inlined for other in between):
                inlined.add(node)
                loads[end] += 1
        return inlined

    def _statement_of(self, node: fx.Node, inlined: set[fx.Node]) -> fx.Node:
        while node in inlined:
            (node,) = node.users
        return node

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """List the values with names of their own that a statement reads."""
        found: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            found.update(dict.fromkeys(self._sources(source) if source in self._inlined else [source]))
        return list(found)

    def _last_uses(self) -> dict[fx.Node, fx.Node]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            if node not in self._inlined:
                for source in self._sources(node):
                    last[source] = node
        return last

    def _headings(self, statements: list[fx.Node]) -> dict[fx.Node, str]:
        """Choose the lines above which a comment says in which block they are."""
        sizes: Counter[str] = Counter()
        for node in statements:
            path = _block(node)
            sizes.update([*ancestors(path), path] if path else [])
        headings: dict[fx.Node, str] = {}
        current = ""
        for node in statements:
            path = _block(node) if node.op != "output" else ""
            around = reversed([*ancestors(path), path])
            block = next((part for part in around if sizes[part] >= BLOCK and not self._is_chain(part)), "")
            if block != current:
                kind = type(self._model.get_submodule(block)).__name__
                headings[node] = f"# {block}: {kind}" if block else f"# {kind}"
            current = block
        return headings

    def _is_chain(self, path: str) -> bool:
        return type(self._model.get_submodule(path)) in (nn.Sequential, nn.ModuleList)


class _DifferError(Exception):
    """Two graphs differ in more than plain values."""


def _either(own: Any, other: Any, same: dict[fx.Node, fx.Node], path: str) -> Any:
    """Join two arguments, with a choice where they are different plain values."""
    if isinstance(own, fx.Node) or isinstance(other, fx.Node):
        if same.get(other) is not own:
            raise _DifferError
        return own
    if isinstance(own, (tuple, list)) and type(own) is type(other) and len(own) == len(other):
        parts = [_either(*pair, same, path) for pair in zip(own, other, strict=True)]
        return type(own)(*parts) if hasattr(own, "_fields") else type(own)(parts)
    if isinstance(own, dict) and isinstance(other, dict) and own.keys() == other.keys():
        return {name: _either(own[name], other[name], same, path) for name in own}
    if isinstance(own, slice) and isinstance(other, slice):
        ends = ("start", "stop", "step")
        return slice(*(_either(getattr(own, end), getattr(other, end), same, path) for end in ends))
    if type(own) is type(other) and own == other:
        return own
    if any(isinstance(value, (tuple, list, dict, slice)) for value in (own, other)):
        raise _DifferError
    return Choice(path, other, own)


def _block(node: fx.Node) -> str:
    """Return the path of the opened layer whose forward holds a node."""
    path = str(node.meta.get(LAYER, ""))
    is_leaf = node.op == "call_module" and path == node.target
    return path.rpartition(".")[0] if is_leaf else path


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"


def _is_cheap(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in CHEAP_METHODS
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or node.kwargs:
        return False
    return node.target is getattr or (_is_operator(node) and (name == "getitem" or name in BINARY or name in UNARY))


def _occurrences(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), lambda source: found.append(source) or source)
    return found
