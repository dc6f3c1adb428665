"""Write values as Python text: tensors, imported names, long expressions broken into lines."""

import base64
import builtins
import importlib
import math
import operator
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from regraft.errors import EditError
from regraft.torch_internals import OpOverload, OpOverloadPacket

WIDTH = 120
FEW = 16  # elements of a tensor that is written as a list at most
LIBRARIES = frozenset({"torch", "torchvision", "timm", "transformers", "math", "operator", "builtins", "collections"})
UNPACK = '''
def unpack(text: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return the tensor whose bytes were compressed into a text."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=dtype).reshape(shape)
'''


class ImportTable:
    """The names that a source file imports or defines at its top.

    Attributes:
        imports: Lines, unsorted.
        definitions: Lines that define what cannot be imported.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self.imports: set[str] = set()
        self.definitions: list[str] = []
        self._known: dict[int, str] = {}
        self._taken = {"F", "nn", "torch", *reserved}

    def of(self, value: Any) -> str:
        """Return the expression for a function or class, and add its import.

        Raises:
            EditError: It belongs to none of the libraries that a source file may import.
        """
        if id(value) not in self._known:
            self._known[id(value)] = self._import(value)
        return self._known[id(value)]

    def _import(self, value: Any) -> str:
        """Add the import of a function or class, and return the expression for it."""
        name = getattr(value, "__name__", "")
        for module, prefix in ((F, "F."), (torch, "torch."), (torch.Tensor, "torch.Tensor."), (builtins, "")):
            if name and getattr(module, name, None) is value:
                self.imports |= {"from torch.nn import functional as F"} if module is F else set()
                return prefix + name
        for module in (operator, math):
            if getattr(module, name, None) is value:
                self.imports.add(f"import {module.__name__}")
                return f"{module.__name__}.{name}"
        if isinstance(value, (OpOverloadPacket, OpOverload)):
            return f"torch.ops.{value}"
        if isinstance(value, type) and issubclass(value, tuple) and not _home(value):
            return self._defined(value)
        home = _home(value)
        if not home:
            raise EditError(f"it uses {name or value!r} of {getattr(value, '__module__', None)}, which is no library")
        own = self._free(name)
        self.imports.add(f"from {home} import {name}" + (f" as {own}" if own != name else ""))
        return own

    def _defined(self, value: Any) -> str:
        if not hasattr(value, "_fields"):
            raise EditError(f"it returns a {value.__name__} of {value.__module__}, which is no library")
        own = self._free(value.__name__)
        self.imports.add("from collections import namedtuple")
        self.definitions.append(f'{own} = namedtuple("{value.__name__}", {quoted(list(value._fields))})')
        return own

    def _free(self, name: str) -> str:
        own, number = name, 2
        while own in self._taken:
            own, number = f"{name}_{number}", number + 1
        self._taken.add(own)
        return own


class Constants:
    """Tensors that are written into a source file, each once.

    Attributes:
        lines: Their definitions, for the end of the file.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, tensor: torch.Tensor, hint: str) -> str:
        """Return an expression for a tensor with the values, dtype and shape of `tensor`.

        Raises:
            EditError: It is sparse, quantized or without values.
        """
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise EditError(f"the tensor '{hint}' is no plain one with values, and no state dict holds it")
        tensor = tensor.detach().cpu().contiguous()
        return _short(tensor) or f"{self._name(tensor, hint)}.clone()"

    def _name(self, tensor: torch.Tensor, hint: str) -> str:
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (data, tensor.dtype, tensor.shape)
        if key not in self._known:
            stem = hint.rpartition(".")[2].strip("_").upper() or "CONSTANT"
            taken = sum(1 for name in self._known.values() if name.rstrip("0123456789") in (stem, f"{stem}_"))
            self._known[key] = name = f"{stem}_{taken + 1}" if taken else stem
            text = base64.b85encode(zlib.compress(data, 9)).decode()
            size = WIDTH - 8
            pieces = [f'    "{text[start : start + size]}"' for start in range(0, len(text), size)]
            shape = "".join(f", {side}" for side in tensor.shape)
            self.lines += [f"{name} = unpack(", *pieces[:-1], f"{pieces[-1]},", f"    {tensor.dtype}{shape},", ")"]
        return self._known[key]


def quoted(value: Any) -> str:
    """Write a plain value with double quotes.

    >>> quoted(["a", 1])
    '["a", 1]'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    text = repr(value)
    simple = isinstance(value, str) and '"' not in value and "\\" not in text
    return f'"{value}"' if simple and text.startswith("'") else text


def wrapped(line: str, indent: int = 0) -> list[str]:
    """Break a line at the commas of its outermost brackets, and so on inwards, until all fits.

    >>> wrapped("made = call(" + "a" * 80 + ", " + "b" * 80 + ")")[0]
    'made = call('
    """
    pad = " " * indent
    cut = _longest_bracket(line)
    if len(pad) + len(line) < WIDTH or cut is None:  # one column is left for a comma
        return [pad + line]
    start, end = cut
    items = _split(line[start + 1 : end])
    loop = _loop(items[0]) if len(items) == 1 else None
    lines = [pad + line[: start + 1]]
    if loop is not None:
        lines += wrapped(items[0][:loop].strip(), indent + 4)
        lines.append(f"{pad}    {items[0][loop:].strip()}")
    else:
        for item in items:
            inner = wrapped(item, indent + 4)
            lines += [*inner[:-1], inner[-1] + ("" if len(items) == 1 and line[start] == "(" else ",")]
    return [*lines, pad + line[end:]]


def _home(value: Any) -> str:
    """Return the module that a function or class is imported from: the shortest path to it."""
    home, name = str(getattr(value, "__module__", "")), getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if home.partition(".")[0] not in LIBRARIES or not name.isidentifier():
        return ""
    parts = home.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        module = sys.modules.get(path) or importlib.import_module(path)
        if vars(module).get(name) is value:
            return path
    return ""


def _short(tensor: torch.Tensor) -> str:
    """Write a tensor that is small or regular as an expression; an empty text where it is neither."""
    dtype, shape = f"dtype={tensor.dtype}", ", ".join(map(str, tensor.shape))
    if tensor.is_floating_point() and (
        not tensor.isfinite().all() or (tensor == 0).logical_and(tensor.signbit()).any()
    ):
        return ""
    if not tensor.numel():
        return f"torch.zeros({shape}, {dtype})"
    written = f"torch.tensor({tensor.tolist()}, {dtype})" if tensor.numel() <= FEW else ""
    if written and len(written) < WIDTH - 40:
        return written
    first = tensor.reshape(-1)[0]
    if (tensor == first).all():
        if first == 0 and tensor.is_floating_point():
            return f"torch.zeros({shape}" + (f", {dtype})" if tensor.dtype is not torch.float32 else ")")
        return f"torch.full(({shape},), {first.item()!r}, {dtype})"
    if tensor.dim() == 1 and tensor.dtype == torch.int64 and tensor.equal(torch.arange(len(tensor))):
        return f"torch.arange({len(tensor)})"
    return ""


def _longest_bracket(line: str) -> tuple[int, int] | None:
    """Return the positions of the longest of the outermost pairs of brackets; None where there is none."""
    starts, ends = ([position for position, sign in _outer_signs(line) if sign in kind] for kind in ("([{", ")]}"))
    pairs = (pair for pair in zip(starts, ends, strict=False) if pair[1] - pair[0] > 1)
    return max(pairs, key=lambda pair: pair[1] - pair[0], default=None)


def _split(text: str) -> list[str]:
    """Split a text at its outermost commas."""
    commas = [position for position, sign in _outer_signs(text) if sign == ","]
    parts = (text[before + 1 : after].strip() for before, after in pairwise([-1, *commas, len(text)]))
    return [part for part in parts if part]


def _loop(text: str) -> int | None:
    """Return the position of the `for` of a comprehension."""
    return next((position for position, _ in _outer_signs(text) if text.startswith(" for _ in ", position)), None)


def _outer_signs(text: str) -> Iterator[tuple[int, str]]:
    """Yield positions and characters outside of strings and brackets; the outermost brackets count as outside."""
    quote, escaped, depth = "", False, 0
    for position, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and not escaped else quote
            escaped = sign == "\\" and not escaped
        elif sign in "'\"":
            quote = sign
        else:
            depth -= sign in ")]}"
            if not depth:
                yield position, sign
            depth += sign in "([{"
