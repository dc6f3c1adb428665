"""What a pickle of torch would build: found without building it, and made plain afterwards.

torch's weights-only unpickler runs no code, but what it builds, and for how long, is for the file to say. Here the
instructions are followed on paper first: of each value only its size and depth are known, and both have limits.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # how pickles of Python 2 are read, by torch as well
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from regraft.errors import CheckpointError

MAX_INSTRUCTIONS = 5_000_000
MAX_OBJECTS = 1_000_000
MAX_DEPTH = 50  # tuples within each other
LARGEST = 1_000_000  # values in one tuple, those within it included
MAX_NAME = 1000  # characters
FREE_BYTES = 2**20  # that a tensor may take beyond what is stored of it, as a number that was expanded does
EXTRA_STATE = "_extra_state"  # how the name of the extra state of a layer ends
LEGACY_PICKLES = 5  # magic number, version, machine, content, names of storages

_CALLS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in ("parameter", "parameter_with_state", "qtensor", "tensor", "tensor_v2", "tensor_v3", "sparse_tensor")
) | {"torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"}
_CALLS |= {"torch.Size", "torch.device", "_codecs.encode", "collections.OrderedDict", "collections.Counter"}
_CALLS |= {"builtins.set", "builtins.complex"}
_OF_TORCH = ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter")
_ITEM_BYTES = {"ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1, "UntypedStorage": 1, "QUInt8Storage": 1}
_ITEM_BYTES |= {"QInt8Storage": 1, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1, "ShortStorage": 2, "HalfStorage": 2}
_ITEM_BYTES |= {"BFloat16Storage": 2, "IntStorage": 4, "FloatStorage": 4, "QInt32Storage": 4, "LongStorage": 8}
_ITEM_BYTES |= {"DoubleStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}


@dataclass(frozen=True)
class _Value:
    """A value on paper: how many values are in it, how deep, and those of a short tuple themselves."""

    size: int = 1
    depth: int = 0
    items: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Global:
    name: str


_MARK = object()
_PLAIN = _Value()


def check_pickle(path: Path, data: bytes, records: Mapping[str, int]) -> None:
    """Check the pickle in a zip file of torch.

    Args:
        path: The file, for the message.
        data: The pickle.
        records: Bytes of each storage beside it, by its key.

    Raises:
        CheckpointError: It is no pickle of tensors, or asks for more than there is.
    """
    _Reader(path, records).read(data)


def check_legacy(path: Path, file: IO[bytes], size: int) -> None:
    """Check a file of torch from before 1.6: pickles one after the other, and the storages behind them.

    Raises:
        CheckpointError: It is none, or asks for more than there is.
    """
    for _ in range(LEGACY_PICKLES):
        _Reader(path, size).read(file)


def made_plain(path: Path, content: Any, size: int) -> Any:
    """Return what an unpickler built as plain dicts, lists, numbers, texts and tensors; whatever else is in it is None.

    Nothing in it has attributes of its own any more, holds itself, or is nested more than `MAX_DEPTH` deep. Tensors are
    the file's own memory.

    Args:
        path: The file, for the message.
        content: What was built.
        size: Bytes of the file.

    Raises:
        CheckpointError: A tensor is of a kind that no network keeps (sparse, quantized), or larger than what the file
            has of it.
    """
    known: dict[int, Any] = {}
    result = _plain(path, content, known, 0)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in known.values()
        if isinstance(tensor, torch.Tensor)
    }
    if sum(storages.values()) > size:
        raise _refused(path, f"its tensors take {sum(storages.values()):,} bytes, and the file has {size:,}")
    return result


def _plain(path: Path, value: Any, known: dict[int, Any], depth: int) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        known[id(value)] = _tensor(path, value)
    elif depth > MAX_DEPTH:
        return None
    elif isinstance(value, dict):
        known[id(value)] = None  # while it is read: what holds itself ends here
        names = [item for item in dict.items(value) if type(item[0]) in (str, int)]
        if any(isinstance(name, str) and len(name) > MAX_NAME for name, _ in names):
            raise _refused(path, f"it has a name of more than {MAX_NAME:,} characters")
        known[id(value)] = {
            name: item if _is_extra_state(name, item) else _plain(path, item, known, depth + 1) for name, item in names
        }
    elif isinstance(value, (list, tuple)):
        known[id(value)] = None
        known[id(value)] = [_plain(path, item, known, depth + 1) for item in value]
    return known.get(id(value))


def _is_extra_state(name: Any, value: Any) -> bool:
    """Return whether a value is the extra state of a layer, and of types that it may have as they are."""
    return isinstance(name, str) and name.endswith(EXTRA_STATE) and _is_simple(value, 0)


def _is_simple(value: Any, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    if type(value) in (dict, OrderedDict):
        return all(_is_simple(key, depth + 1) and _is_simple(item, depth + 1) for key, item in value.items())
    return type(value) in (list, tuple, set) and all(_is_simple(item, depth + 1) for item in value)


def _tensor(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its class and attributes, on the same memory."""
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise _refused(path, f"it holds a tensor of the class {type(tensor).__name__}")
    plain = torch.Tensor.detach(tensor)
    if plain.layout is not torch.strided or plain.is_quantized or plain.is_nested or plain.device.type != "cpu":
        if plain.is_quantized:
            raise CheckpointError(
                f"'{path}' holds quantized weights (torch.ao, {str(plain.dtype).removeprefix('torch.')}). Expected "
                "plain ones. Call dequantize() on them where the file was made, and save the result."
            )
        kind = str(plain.layout).removeprefix("torch.")
        raise _refused(path, f"it holds a tensor that is {kind} on '{plain.device}', expected a plain one with values")
    taken, there = plain.numel() * plain.itemsize, plain.untyped_storage().nbytes()
    if taken > max(there, FREE_BYTES):
        raise _refused(
            path, f"a tensor of the shape {tuple(plain.shape)} takes {taken:,} bytes, and {there:,} are stored"
        )
    # One element may have any stride, and is contiguous to torch all the same; until it is viewed as bytes.
    return plain.clone(memory_format=torch.contiguous_format) if taken <= plain.itemsize else plain


class _Reader:
    """Follows the instructions of one pickle; those that torch's unpickler knows, and no others."""

    def __init__(self, path: Path, records: Mapping[str, int] | int) -> None:
        self._path, self._records = path, records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._claims: dict[str, int] = {}
        self._claimed = 0

    def read(self, data: bytes | IO[bytes]) -> None:
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
                if count > MAX_INSTRUCTIONS or self._objects > MAX_OBJECTS:
                    raise _refused(self._path, f"it builds more than {MAX_OBJECTS:,} objects")
                self._follow(instruction.name, argument)
        except CheckpointError:
            raise
        except Exception as error:  # whatever pickletools says of what is no pickle
            raise _no_pickle(self._path) from error

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "STOP":
                return
            case "NONE" | "NEWFALSE" | "NEWTRUE" | "BINFLOAT":
                stack.append(_PLAIN)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self._objects += 1
                stack.append(_Value(items=() if name == "EMPTY_TUPLE" else None))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self._to_mark() if name == "TUPLE" else self._last(int(name[-1]))
                stack.append(self._tuple(items))
            case "APPEND" | "BUILD":
                self._last(1)
            case "SETITEM":
                self._last(2)
            case "APPENDS" | "SETITEMS":
                self._to_mark()
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "NEWOBJ" | "REDUCE":
                stack.append(self._call(*self._last(2)))
            case "BINPERSID":
                self._storage(*self._last(1))
                stack.append(_PLAIN)
            case _:
                raise _no_pickle(self._path)

    def _last(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise _no_pickle(self._path)
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:  # an IndexError where there is none
            place -= 1
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _tuple(self, items: list[Any]) -> _Value:
        self._objects += 1
        nested = [item for item in items if isinstance(item, _Value)]
        size = len(items) + sum(item.size for item in nested)
        depth = 1 + max((item.depth for item in nested), default=0)
        if size > LARGEST or depth > MAX_DEPTH:
            raise _refused(self._path, f"it nests values {depth} deep, {size:,} in all")
        return _Value(size, depth, tuple(items) if len(items) <= 8 else None)

    def _global(self, module: str, last: str) -> _Global:
        known = NAME_MAPPING.get((module, last))
        module, last = known if known is not None else (IMPORT_MAPPING.get(module, module), last)
        name = f"{module}.{last}"
        if len(name) > MAX_NAME:
            raise _refused(self._path, f"it names something of {len(name):,} characters")
        is_type = module in ("torch", "torch.storage") and (
            last.endswith("Storage") or last.islower() or last[:1] == "Q"
        )
        is_torchs = module in _OF_TORCH and not is_type and name not in _CALLS and name != "torch.Tensor"
        if is_torchs or name == "builtins.bytearray":  # what torch would call, and no file of weights needs
            raise CheckpointError(
                f"'{self._path}' holds more than tensors ({name}), and reading it could take any memory or run code "
                "from it. On a machine where you trust the file, load it yourself and write "
                "torch.save(model.state_dict(), …)."
            )
        return _Global(name)

    def _call(self, function: Any, arguments: Any) -> _Value:
        self._objects += 1
        name = function.name if isinstance(function, _Global) else ""
        items = arguments.items if isinstance(arguments, _Value) else None
        if name.startswith("torch.") and name not in _CALLS and name.rpartition(".")[0] in _OF_TORCH:
            raise _refused(self._path, f"it calls {name}")
        if name == "_codecs.encode" and (items is None or items[1:] != ("latin1",)):
            raise _refused(self._path, "it calls _codecs.encode for another encoding than latin1")
        if name == "torch._tensor._rebuild_from_type_v2":
            inner = items[0] if items else None
            if not isinstance(inner, _Global) or not inner.name.startswith("torch._utils._rebuild_"):
                raise _refused(self._path, f"it calls {name} for something else than tensors")
        return _Value(1, arguments.depth) if isinstance(arguments, _Value) else _PLAIN

    def _storage(self, identity: Any) -> None:
        """Check that a storage is no longer than the bytes that the file has of it."""
        items = identity.items if isinstance(identity, _Value) else None
        if items and items[0] == "module" and isinstance(self._records, int):
            return  # the source of a class in an older file, which nothing reads
        if items is None or len(items) < 5 or items[0] != "storage":
            raise _refused(self._path, "it refers to something that is no storage")
        kind, key, count = items[1], items[2], items[4]
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Global) else ""
        if name not in _ITEM_BYTES or not isinstance(key, str) or type(count) is not int or count < 0:
            raise _refused(self._path, f"it describes a storage by {name or kind!r}, {key!r}, {count!r}")
        there = self._records if isinstance(self._records, int) else self._records.get(key, 0)
        claimed = count * _ITEM_BYTES[name]
        self._claimed += 0 if self._claims.get(key) == claimed else claimed
        self._claims[key] = claimed
        if claimed > there or (isinstance(self._records, int) and self._claimed > there):
            raise _refused(
                self._path, f"the storage '{key[:40]}' claims {count:,} × {_ITEM_BYTES[name]} bytes of {there:,}"
            )


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"'{path}' cannot be read as weights: {reason}. Get or make the file again.")


def _no_pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' cannot be read as weights: UnpicklingError: no pickle that holds tensors. "
        "Expected a safetensors file or one that torch.save wrote."
    )
