"""Parse layer expressions: text that reads like constructor calls, into plain values, and back.

Text is parsed with `ast` and never evaluated. Anything but calls of named classes with literals or further calls as
arguments is refused, and so is text that is longer or deeper than any network needs.
"""

import ast
import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import EditError, nearest

MAX_LENGTH = 100_000  # characters
MAX_DEPTH = 50  # calls, tuples, lists and dicts within each other
MAX_NODES = 20_000  # calls and literals

EXPECTED = (
    "Expected constructor calls with numbers, strings, True, False, None, tuples, lists, dicts or further calls as "
    "arguments, as in Sequential(Linear(512, 400), ReLU()). Nothing was executed."
)


@dataclass(frozen=True)
class LayerCall:
    """A constructor call; its arguments are literals, further calls, and tuples, lists and dicts of them.

    Attributes:
        name: The class, as in `"Linear"` or `"timm.layers.LayerNorm2d"`; `"py"` for a class of the user's own, which
            the first argument names.
        positional: Arguments without a name.
        keywords: Arguments by name.
    """

    name: str
    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = (f"{name}={written(value)}" for name, value in self.keywords.items())
        return f"{self.name}({', '.join([*map(written, self.positional), *named])})"


def calls_in(value: Any) -> Iterator[LayerCall]:
    """Yield the calls in a value, from the outside inwards and from left to right."""
    if isinstance(value, LayerCall):
        yield value
        value = [*value.positional, *value.keywords.values()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from calls_in(item)


def written(value: Any) -> str:
    """Write a value as text, which `parsed` reads as the same value.

    Raises:
        EditError: It is or holds something other than literals and calls.

    >>> written(Call("Linear", (8, 4), {"bias": False}))
    'Linear(8, 4, bias=False)'
    """
    if value is None or isinstance(value, (bool, LayerCall)):
        return str(value)
    if isinstance(value, str):
        return repr(str.__str__(value))
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real) and not math.isnan(float(value)):
        number = float(value)
        return repr(number) if math.isfinite(number) else "1e999" if number > 0 else "-1e999"  # text has no `inf`
    if isinstance(value, (tuple, list, dict)):
        return container_text(value, written)
    raise EditError(f"{shortened(repr(value))} is a {type(value).__name__}, which no text stands for")


def container_text(value: tuple[Any, ...] | list[Any] | dict[Any, Any], write: Callable[[Any], str]) -> str:
    """Write a tuple, list or dict as Python does, with `write` for what it holds."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(key)}: {write(item)}" for key, item in value.items()) + "}"
    inner = ", ".join(map(write, value))
    return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"


def parsed(text: str) -> Any:
    """Parse text into a value: a call, or a tuple of the values between commas.

    Raises:
        EditError: The text is malformed, holds anything but calls and literals, or is too long or too deep.

    >>> parsed("Linear(8, 4, bias=False), ReLU()")[1]
    Call(name='ReLU', positional=(), keywords={})
    """
    if len(text) > MAX_LENGTH:
        raise EditError(f"a layer expression has {len(text):,} characters, and no more than {MAX_LENGTH:,} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and numbers
            tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        where = f" at character {error.offset}" if error.offset else ""
        raise EditError(
            f"the layer expression '{shortened(text)}' is malformed: {error.msg}{where}. {EXPECTED}"
        ) from error
    except (ValueError, MemoryError, RecursionError) as error:
        raise EditError(f"the layer expression '{shortened(text)}' is too deep or malformed. {EXPECTED}") from error
    return _Reader(text.strip()).value(tree.body, 1)


def shortened(text: str, limit: int = 80) -> str:
    """Cut a text that is too long for a message."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class _Reader:
    """Turns the nodes of a syntax tree into values, and refuses all that a layer expression may not hold."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._nodes = 0

    def value(self, node: ast.expr, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise EditError(f"a layer expression has more than {MAX_NODES:,} parts: '{shortened(self._text)}'.")
        if depth > MAX_DEPTH:
            raise EditError(f"a layer expression is nested more than {MAX_DEPTH} deep: '{shortened(self._text)}'.")
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return node.value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as number)):
                if isinstance(number, bool):
                    raise self._refused(node, "a sign before a boolean")
                return -number if isinstance(sign, ast.USub) else number
            case ast.Tuple():
                return tuple(self.value(item, depth + 1) for item in node.elts)
            case ast.List():
                return [self.value(item, depth + 1) for item in node.elts]
            case ast.Dict():
                return self._dict(node, depth)
            case ast.Call():
                return self._call(node, depth)
            case ast.Name():
                raise self._refused(node, "a name", _hint(node.id))
        raise self._refused(node, _KINDS.get(type(node), type(node).__name__))

    def _dict(self, node: ast.Dict, depth: int) -> dict[Any, Any]:
        entries = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and isinstance(key.value, (str, int, float))):
                raise self._refused(node, "a dict whose keys are no plain literals")
            if key.value in entries:
                raise self._refused(node, f"a dict with the key {key.value!r} twice")
            entries[key.value] = self.value(item, depth + 1)
        return entries

    def _call(self, node: ast.Call, depth: int) -> LayerCall:
        name = _dotted(node.func)
        if name is None:
            raise self._refused(node.func, f"a call of {_KINDS.get(type(node.func), type(node.func).__name__)}")
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._refused(keyword.value, "a ** argument")
            if keyword.arg in keywords:
                raise self._refused(node, f"the argument '{keyword.arg}' twice")
            keywords[keyword.arg] = self.value(keyword.value, depth + 1)
        return LayerCall(name, tuple(self.value(item, depth + 1) for item in node.args), keywords)

    def _refused(self, node: ast.expr, kind: str, hint: str = "") -> EditError:
        """Build the error for a part of the text."""
        part = shortened(ast.get_source_segment(self._text, node) or self._text)
        where = "" if part == shortened(self._text) else f" of '{shortened(self._text)}'"
        return EditError(f"'{part}'{where} is {kind}, which a layer expression may not hold. {hint}{EXPECTED}")


_KINDS: dict[type[ast.AST], str] = {
    ast.Attribute: "an attribute access",
    ast.Await: "an await",
    ast.BinOp: "a computation",
    ast.BoolOp: "a computation",
    ast.Call: "what a call returns",
    ast.Compare: "a comparison",
    ast.Constant: "a literal of another kind",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.IfExp: "a condition",
    ast.JoinedStr: "an f-string",
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.NamedExpr: "an assignment",
    ast.Set: "a set",
    ast.SetComp: "a comprehension",
    ast.Starred: "a * argument",
    ast.Subscript: "a subscript",
    ast.UnaryOp: "a computation",
}


def _dotted(node: ast.expr) -> str | None:
    """Return `a.b.c` for names and attributes; None for anything else, or for more dots than any class has."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute) and len(parts) < MAX_DEPTH:
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _hint(name: str) -> str:
    near = nearest(name.capitalize(), ["True", "False", "None"]) if name.islower() else ""
    return f"{near} " if near else f"For a layer without arguments write {name}(). "
