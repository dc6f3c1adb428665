"""Write a graph as the lines of a readable Python function.

Values are called x, y, z, …; a value after its last use gives its name to the value that is computed from it. What is
cheap and used once, such as a size, is inlined where it is used. A comment names the block whose forward the lines are.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from regraft.anatomy.dataflow.graph import LAYER, Flow, ancestors, nodes_in, tidy
from regraft.errors import EditError
from regraft.surgery.codegen.literals import ImportTable, quoted
from regraft.surgery.layer_text.parse import container_text
from regraft.torch_internals import ASSERT

BLOCK = 5  # lines from which on a block gets a comment
LOAD = 4  # operations that are inlined into one line at most
POOL = [*"xyzuvwpqrstabcdefghij"]  # names of values, in the order in which they are given
BINARY = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"}
BINARY |= {"matmul": "@", "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>"}
BINARY |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Precedence of Python's operators, unary ones at 6 and comparisons below all.
STRENGTH = {"**": 7, "*": 5, "/": 5, "//": 5, "%": 5, "@": 5, "+": 4, "-": 4, "<<": 3, ">>": 3, "&": 2, "^": 1, "|": 0}
UNARY = {"neg": "-", "invert": "~", "pos": "+"}
IN_PLACE = {f"i{name.strip('_')}": sign for name, sign in BINARY.items() if name not in ("eq", "ne", "lt", "gt")}
CHEAP_METHODS = frozenset({"size", "dim", "numel", "ndimension"})


@dataclass(frozen=True)
class BranchChoice:
    """A plain value that depends on the mode of a layer: written as `(train if self.training else evaluate)`."""

    path: str
    train: Any
    evaluate: Any


def simplify(flow: Flow, model: nn.Module) -> None:
    """Remove from a graph, in place, what computes nothing: identity layers, checks, values that are not used."""
    for node in list(flow.graph.nodes):
        is_identity = node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.Identity
        if is_identity and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            flow.graph.erase_node(node)
        elif node.op == "call_function" and node.target is ASSERT and not node.users:
            flow.graph.erase_node(node)
    tidy(flow.graph, model.get_submodule)


def merged(evaluate: Flow, train: Flow) -> bool:
    """Merge the graphs of both modes into the first, in place, where they differ in plain values alone.

    Returns:
        Whether they were merged; else both are as before.
    """
    eval_nodes, train_nodes = list(evaluate.graph.nodes), list(train.graph.nodes)
    if len(eval_nodes) != len(train_nodes):
        return False
    counterparts = dict(zip(train_nodes, eval_nodes, strict=True))
    arguments = []
    for node, train_node in zip(eval_nodes, train_nodes, strict=True):
        if (node.op, node.target) != (train_node.op, train_node.target):
            return False
        pair = (node.args, node.kwargs), (train_node.args, train_node.kwargs)
        try:
            arguments.append((node, *_merge_arguments(*pair, counterparts, _block(node))))
        except _DifferError:
            return False
    for node, args, kwargs in arguments:  # after the loop, so that graphs that differ further on stay as they are
        node.args, node.kwargs = args, kwargs
    return True


class ForwardWriter:
    """Writes the graph of one mode.

    Args:
        flow: The graph, simplified.
        attribute: Returns the expression for a layer or tensor at a path.
        names: Gives functions and classes their names, and collects the imports.
        model: The network, whose class names stand in the comments.
    """

    def __init__(self, flow: Flow, attribute: Callable[[str], str], names: ImportTable, model: nn.Module) -> None:
        self._graph, self._attribute, self._names, self._model = flow.graph, attribute, names, model
        self._order = {node: position for position, node in enumerate(flow.graph.nodes)}
        self._inlined = self._choose_inlined()
        self._variables = {node: str(node.target) for node in flow.graph.nodes if node.op == "placeholder"}
        self._free: set[str] = set()
        self._used = set(self._variables.values())

    def lines(self) -> list[str]:
        """Write the body of the function."""
        # Statements are the nodes that get a line of their own; all others are inlined into the line of their user.
        last = self._last_uses()
        statements = [node for node in self._graph.nodes if node.op != "placeholder" and node not in self._inlined]
        headings = self._headings(statements)
        written: list[str] = []
        for node in statements:
            if node in headings:
                written += ["", headings[node]] if written else [headings[node]]
            dying = [source for source in self._sources(node) if last[source] is node]
            written += self._statement(node, dying)
        # `x = f(x)` and `return x` become `return f(x)`.
        if len(written) > 1 and written[-2].startswith(f"{written[-1].removeprefix('return ')} = "):
            written[-2:] = ["return " + written[-2].partition(" = ")[2]]
        return written

    def _statement(self, node: fx.Node, dying: list[fx.Node]) -> Iterator[str]:
        """Write the lines of one node; `dying` are the values that it is the last to read."""
        if node.op == "output":
            yield f"return {self._text(node.args[0])}"
            return
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name == "setitem":
            yield f"{self._operand(node.args[0])}[{self._index(node.args[1])}] = {self._text(node.args[2])}"
            self._release(dying, None)
            return
        if node.op == "call_function" and name in IN_PLACE and _is_operator(node):
            changed, operand = self._text(node.args[0]), self._text(node.args[1])
            # Only the changed value may pass on its name here: the name of the operand is still read in this statement.
            variable = self._release([source for source in dying if source is node.args[0]], node)
            self._release([source for source in dying if source is not node.args[0]], None)
            if variable != changed:  # an input keeps its name, and so does a value that is still used
                yield f"{variable} = {changed}"
            yield f"{variable} {IN_PLACE[name]}= {operand}"
            return
        expression = self._expression(node)  # before `_release`, which gives the names that it reads away
        variable = self._release(dying, node if node.users else None)
        yield f"{variable} = {expression}" if variable else expression

    def _release(self, dying: list[fx.Node], node: fx.Node | None) -> str:
        """Free the names of values after their last use, and return a name for the value of `node`; None: for none."""
        freed = [self._variables[source] for source in dying]
        # Names from outside of the pool are the user's, of inputs: no other value gets them.
        freed = sorted((name for name in freed if name in POOL), key=POOL.index)
        self._free.update(freed)
        if node is None:
            return ""
        # A name that was just freed comes first: `x = self.conv(x)` reads as a chain.
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
        # `getattr(x, "shape")` is how a graph writes `x.shape`.
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
        """Write an operand of the operator `around`, in parentheses where these are needed or help the reader."""
        text = self._text(value)
        if isinstance(value, fx.Node) and value in self._inlined and _is_operator(value):
            name = getattr(value.target, "__name__", "")
            # Of equal strength, a first operand needs none (`a - b - c`) and a second one does (`a - (b - c)`). Mixed
            # products get them too: `(a / b) * c` is easier to read than `a / b * c`.
            own, outer = 6 if name in UNARY else STRENGTH.get(BINARY.get(name, ""), -1), STRENGTH.get(around, 9)
            is_loose = own < outer or (own == outer and (is_second or (own == 5 and BINARY[name] != around)))
            return text if name == "getitem" or not is_loose else f"({text})"
        # `-1 ** x` is -(1 ** x), and `-1.abs()` does not parse.
        is_negative = isinstance(value, (int, float)) and text.startswith("-") and around in ("", "**")
        return f"({text})" if is_negative or isinstance(value, complex) else text

    def _index(self, value: Any) -> str:
        parts = value if isinstance(value, tuple) and value else (value,)
        # Without the parentheses of a tuple, as slices are written with colons only directly inside of the brackets.
        texts = [self._slice(part) if isinstance(part, slice) else self._text(part) for part in parts]
        return ", ".join(texts) + ("," if isinstance(value, tuple) and len(value) == 1 else "")

    def _slice(self, value: slice) -> str:
        start, stop = ("" if end is None else self._text(end) for end in (value.start, value.stop))
        return f"{start}:{stop}" + ("" if value.step is None else f":{self._text(value.step)}")

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._expression(value) if value in self._inlined else self._variables[value]
        if isinstance(value, BranchChoice):
            training = self._attribute(f"{value.path}.training".lstrip("."))
            return f"({self._text(value.train)} if {training} else {self._text(value.evaluate)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._names.of(type(value))}({', '.join(map(self._text, value))})"
        if isinstance(value, (tuple, list, dict)):
            return container_text(value, self._text)
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        return self._literal(value)

    def _literal(self, value: Any) -> str:
        """Write a value that is no container.

        Raises:
            EditError: No expression makes such a value again.
        """
        if isinstance(value, np.generic):
            value = value.item()
        # The repr of these is a bare name, `inf` or `nan`.
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
        """Choose the nodes that are inlined: tensors of the network, and what is cheap and used once."""
        inlined = {node for node in self._graph.nodes if node.op == "get_attr"}
        loads: Counter[fx.Node] = Counter()
        # From the end, so that it is known into which statement the user of a node goes.
        for node in reversed(list(self._graph.nodes)):
            if node in inlined or not _is_cheap(node) or len(node.users) != 1:
                continue
            (user,) = node.users
            uses = [source for source in nodes_in((user.args, user.kwargs)) if source is node]
            end = self._statement_of(user, inlined)
            # Inlining moves the evaluation of a node to `end`; a statement in between might write to what it reads.
            start, stop = self._order[node], self._order[end]
            between = [step for step in self._order if start < self._order[step] < stop]
            if len(uses) == 1 and loads[end] < LOAD and all(step in inlined for step in between):
                inlined.add(node)
                loads[end] += 1
        return inlined

    def _statement_of(self, node: fx.Node, inlined: set[fx.Node]) -> fx.Node:
        """Return the node whose line an inlined node ends up in."""
        while node in inlined:
            (node,) = node.users
        return node

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """List the values with names of their own that a statement reads."""
        sources: dict[fx.Node, None] = {}  # an ordered set: the order decides which name is used again
        for source in node.all_input_nodes:
            sources.update(dict.fromkeys(self._sources(source) if source in self._inlined else [source]))
        return list(sources)

    def _last_uses(self) -> dict[fx.Node, fx.Node]:
        """Return for each value the last statement that reads it."""
        statements = (node for node in self._graph.nodes if node not in self._inlined)
        return {source: node for node in statements for source in self._sources(node)}

    def _headings(self, statements: list[fx.Node]) -> dict[fx.Node, str]:
        """Return the comments that name a block, by the statement above which they stand."""
        sizes: Counter[str] = Counter()
        for node in statements:
            path = _block(node)
            sizes.update([*ancestors(path), path] if path else [])
        headings: dict[fx.Node, str] = {}
        current = ""
        for node in statements:
            path = _block(node) if node.op != "output" else ""
            around = reversed([*ancestors(path), path])
            # The innermost block that is large enough; a Sequential says nothing about what its lines do.
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


def _merge_arguments(evaluate: Any, train: Any, counterparts: dict[fx.Node, fx.Node], path: str) -> Any:
    """Merge the arguments of one node in both modes, with a `BranchChoice` where they are different plain values.

    Args:
        evaluate: The argument in evaluation mode.
        train: The argument in training mode.
        counterparts: The node of the evaluation graph for each node of the training graph.
        path: The layer whose mode decides.

    Raises:
        _DifferError: They differ in more than plain values.
    """
    if isinstance(evaluate, fx.Node) or isinstance(train, fx.Node):
        if counterparts.get(train) is not evaluate:
            raise _DifferError
        return evaluate
    if isinstance(evaluate, (tuple, list)) and type(evaluate) is type(train) and len(evaluate) == len(train):
        parts = [_merge_arguments(*pair, counterparts, path) for pair in zip(evaluate, train, strict=True)]
        return type(evaluate)(*parts) if hasattr(evaluate, "_fields") else type(evaluate)(parts)
    if isinstance(evaluate, dict) and isinstance(train, dict) and evaluate.keys() == train.keys():
        return {name: _merge_arguments(evaluate[name], train[name], counterparts, path) for name in evaluate}
    if isinstance(evaluate, slice) and isinstance(train, slice):
        ends = ("start", "stop", "step")
        return slice(
            *(_merge_arguments(getattr(evaluate, end), getattr(train, end), counterparts, path) for end in ends)
        )
    # The type counts as well: `1 == True == 1.0`, which are not the same argument.
    if type(evaluate) is type(train) and evaluate == train:
        return evaluate
    if any(isinstance(value, (tuple, list, dict, slice)) for value in (evaluate, train)):
        raise _DifferError
    return BranchChoice(path, train, evaluate)


def _block(node: fx.Node) -> str:
    """Return the path of the traced layer whose forward holds a node."""
    # A leaf layer's own call is recorded under the leaf's path, but the line stands in the forward around it.
    path = str(node.meta.get(LAYER, ""))
    is_leaf = node.op == "call_module" and path == node.target
    return path.rpartition(".")[0] if is_leaf else path


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"


def _is_cheap(node: fx.Node) -> bool:
    """Return whether a node is short to write: a size, an attribute, an index, an operator."""
    if node.op == "call_method":
        return node.target in CHEAP_METHODS
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or node.kwargs:
        return False
    return node.target is getattr or (_is_operator(node) and (name == "getitem" or name in BINARY or name in UNARY))
