"""Check a pickle of torch before it is unpickled, and reduce the result to plain data afterwards.

`torch.load(weights_only=True)` runs no code of the file, but the file decides how much is built. So `check_pickle`
interprets the opcodes symbolically first. It keeps a stack and a memo as an unpickler does, but a value on that stack
is only a size (values inside it) and a depth (tuples within tuples). Nothing is built, imported or called.

    opcode              simulated stack, top on the right
    MARK                MARK
    BININT1 3           MARK 3
    BININT1 4           MARK 3 4
    TUPLE               _Value(size=2, depth=1, items=(3, 4))        the shape (3, 4) of a tensor

Refused are: an opcode that torch does not accept, a function of torch that no file of weights needs, too many opcodes
or objects, tuples that are too large or too deep, and a storage that claims more bytes than the file has for it. After
torch has unpickled the file, `to_plain_data` keeps only tensors and plain data of the result.

Alternatives: limits on a child process cost a process start for each file, and differ between operating systems.
Unpickling first and measuring afterwards is too late: the memory is already taken. A reader of our own in the place of
torch's would have to follow every change of its format; `restricted_unpickler` is one, for files that torch refuses.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from regraft.checkpoint.foreign.kinds import unreadable_error
from regraft.checkpoint.foreign.restricted_unpickler import STORAGES
from regraft.checkpoint.foreign.state_dicts import is_extra_state
from regraft.errors import CheckpointError
from regraft.torch_internals import PYTHON2_MODULES, PYTHON2_NAMES

MAX_INSTRUCTIONS = 5_000_000
MAX_OBJECTS = 1_000_000
MAX_DEPTH = 50  # tuples within each other
MAX_TUPLE = 1_000_000  # values in one tuple, including those in tuples within it
MAX_NAME = 1000  # characters
FREE_BYTES = 2**20  # size of a tensor that may exceed its stored bytes, as an expanded scalar does
EXPECTED_TORCH = "Expected a safetensors file or one that torch.save wrote."
LEGACY_PICKLES = 5  # magic number, version, machine, content, keys of storages

# The functions that a file of weights needs. torch's own list of safe names is longer.
_CALLS = frozenset(
    f"torch._utils._rebuild_{name}"
    for name in ("parameter", "parameter_with_state", "qtensor", "tensor", "tensor_v2", "tensor_v3", "sparse_tensor")
) | {"torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"}
_CALLS |= {"torch.Size", "torch.device"}
_OF_TORCH = ("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter")
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in STORAGES.items()} | {"QInt32Storage": 4}
_ITEM_BYTES |= dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1)


@dataclass(frozen=True)
class _Value:
    """A value on the simulated stack.

    Attributes:
        size: Number of values in it.
        depth: Nesting of tuples in it.
        items: The elements of a short tuple, which may describe a storage or a call; None for any other value.
    """

    size: int = 1
    depth: int = 0
    items: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to, with its module; it is not imported."""

    name: str


_MARK = object()
_ANY_VALUE = _Value()


def check_pickle(path: Path, data: bytes, records: Mapping[str, int]) -> None:
    """Check the pickle in a zip file of torch.

    Args:
        path: The file, for the message.
        data: The pickle.
        records: Key of a storage → its bytes in the zip file.

    Raises:
        CheckpointError: It is not a pickle of tensors, or claims more than the file holds.
    """
    _Interpreter(path, records).read(data)


def check_legacy(path: Path, file: IO[bytes], size: int) -> None:
    """Check a file of torch from before 1.6: consecutive pickles, followed by the storages.

    Args:
        path: The file, for the message.
        file: The opened file, at its start.
        size: Bytes of the file.

    Raises:
        CheckpointError: It is not such a file, or claims more than the file holds.
    """
    for _ in range(LEGACY_PICKLES):
        _Interpreter(path, size).read(file)


def to_plain_data(path: Path, content: Any, size: int) -> Any:
    """Return an unpickled value as plain dicts, lists, numbers, strings, bytes and tensors; anything else becomes None.

    No value keeps attributes, contains itself, or is nested more than `MAX_DEPTH` deep. Tensors share the memory of the
    unpickled ones.

    Args:
        path: The file, for the message.
        content: The unpickled value.
        size: Bytes of the file.

    Raises:
        CheckpointError: A tensor is not strided, plain and on the CPU (sparse, quantized), or larger than its stored
            bytes.
    """
    known: dict[int, Any] = {}
    result = _to_plain(path, content, known, 0)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in known.values()
        if isinstance(tensor, torch.Tensor)
    }
    # Counted per storage, as tensors may share one. Each tensor was checked by itself; this checks all together.
    if sum(storages.values()) > size:
        raise _refusal_error(path, f"its tensors take {sum(storages.values()):,} bytes, and the file has {size:,}")
    return result


def _to_plain(path: Path, value: Any, known: dict[int, Any], depth: int) -> Any:
    """Convert one value; `known` maps the identity of a converted value to its result, as values may be shared."""
    # type(...) instead of isinstance: a subclass may carry methods and attributes, which plain data must not.
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        known[id(value)] = _plain_tensor(path, value)
    elif depth > MAX_DEPTH:
        return None
    elif isinstance(value, dict):
        known[id(value)] = None  # while it is converted: a dict that contains itself ends here
        names = [item for item in dict.items(value) if type(item[0]) in (str, int)]
        if any(isinstance(name, str) and len(name) > MAX_NAME for name, _ in names):
            raise _refusal_error(path, f"it has a name of more than {MAX_NAME:,} characters")
        known[id(value)] = {
            name: item if _is_extra_state(name, item) else _to_plain(path, item, known, depth + 1)
            for name, item in names
        }
    elif isinstance(value, (list, tuple)):
        known[id(value)] = None
        known[id(value)] = [_to_plain(path, item, known, depth + 1) for item in value]
    return known.get(id(value))


def _is_extra_state(name: Any, value: Any) -> bool:
    """Return whether a value is the extra state of a layer and holds plain data only, so that it is kept unchanged."""
    return isinstance(name, str) and is_extra_state(name) and _is_simple(value, 0)


def _is_simple(value: Any, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return True
    if type(value) in (dict, OrderedDict):
        return all(_is_simple(key, depth + 1) and _is_simple(item, depth + 1) for key, item in value.items())
    return type(value) in (list, tuple, set) and all(_is_simple(item, depth + 1) for item in value)


def _plain_tensor(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its class and attributes, on the same memory.

    Raises:
        CheckpointError: It is not a plain tensor on the CPU, or its shape needs more bytes than are stored.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise _refusal_error(path, f"it holds a tensor of the class {type(tensor).__name__}")
    plain = torch.Tensor.detach(tensor)  # the method of the class, whatever attributes the tensor has
    if plain.layout is not torch.strided or plain.is_quantized or plain.is_nested or plain.device.type != "cpu":
        if plain.is_quantized:
            raise CheckpointError(
                f"'{path}' holds quantized weights (torch.ao, {str(plain.dtype).removeprefix('torch.')}). Expected "
                "plain ones. Call dequantize() on them where the file was made, and save the result."
            )
        kind = str(plain.layout).removeprefix("torch.")
        reason = f"it holds a tensor that is {kind} on '{plain.device}', expected a plain one with values"
        raise _refusal_error(path, reason)
    needed, stored = plain.numel() * plain.itemsize, plain.untyped_storage().nbytes()
    if needed > max(stored, FREE_BYTES):
        reason = f"a tensor of the shape {tuple(plain.shape)} takes {needed:,} bytes, and {stored:,} are stored"
        raise _refusal_error(path, reason)
    # torch calls a tensor of one element contiguous whatever its strides are, but viewing it as bytes then fails.
    return plain.clone(memory_format=torch.contiguous_format) if needed <= plain.itemsize else plain


class _Interpreter:
    """Interprets the opcodes of pickles symbolically; only those that torch's weights-only unpickler accepts.

    Args:
        path: The file, for the message.
        records: Bytes of each storage by its key; or of the whole file, where storages have no place of their own.
    """

    def __init__(self, path: Path, records: Mapping[str, int] | int) -> None:
        self._path, self._records = path, records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._claims: dict[str, int] = {}
        self._claimed = 0

    def read(self, data: bytes | IO[bytes]) -> None:
        """Interpret one pickle up to its STOP.

        Raises:
            CheckpointError: It is no pickle, has another opcode, or exceeds a limit.
        """
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
                if count > MAX_INSTRUCTIONS or self._objects > MAX_OBJECTS:
                    raise _refusal_error(self._path, f"it builds more than {MAX_OBJECTS:,} objects")
                self._apply_opcode(instruction.name, argument)
        except CheckpointError:
            raise
        except Exception as error:  # pickletools raises many types on malformed data
            raise no_pickle_error(self._path) from error

    def _apply_opcode(self, name: str, argument: Any) -> None:
        """Apply one opcode to the simulated stack and memo."""
        stack = self._stack
        match name:
            case "PROTO" | "STOP":
                return
            case "NONE" | "NEWFALSE" | "NEWTRUE" | "BINFLOAT":
                stack.append(_ANY_VALUE)
            # Integers and texts are kept as they are: keys and sizes of storages are checked against the file.
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "GLOBAL":
                stack.append(self._resolve_name(*argument.split(" ", 1)))
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self._objects += 1
                stack.append(_Value(items=() if name == "EMPTY_TUPLE" else None))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self._pop_to_mark() if name == "TUPLE" else self._pop(int(name[-1]))
                stack.append(self._make_tuple(items))
            # The list, dict or object below keeps its size and depth: what is added to it was counted, as objects or
            # as opcodes, when it was pushed.
            case "APPEND" | "BUILD":
                self._pop(1)
            case "SETITEM":
                self._pop(2)
            case "APPENDS" | "SETITEMS":
                self._pop_to_mark()
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "NEWOBJ" | "REDUCE":
                stack.append(self._apply_call(*self._pop(2)))
            case "BINPERSID":
                self._check_storage(*self._pop(1))
                stack.append(_ANY_VALUE)
            case _:
                raise no_pickle_error(self._path)

    def _pop(self, count: int) -> list[Any]:
        """Pop the last `count` values."""
        if len(self._stack) < count:
            raise no_pickle_error(self._path)
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        """Pop all values above the last mark, and the mark."""
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:  # without a mark, the IndexError becomes "no pickle" in `read`
            place -= 1
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def _make_tuple(self, items: list[Any]) -> _Value:
        """Return a tuple of some values, by its size and depth.

        Raises:
            CheckpointError: It is too large or too deep.
        """
        self._objects += 1
        # A tuple inside of a tuple counts each time it is used, so the size is that of the expanded value.
        nested = [item for item in items if isinstance(item, _Value)]
        size = len(items) + sum(item.size for item in nested)
        depth = 1 + max((item.depth for item in nested), default=0)
        if size > MAX_TUPLE or depth > MAX_DEPTH:
            raise _refusal_error(self._path, f"it nests values {depth} deep, {size:,} in all")
        return _Value(size, depth, tuple(items) if len(items) <= 8 else None)

    def _resolve_name(self, module: str, last: str) -> _Global:
        """Return the name that GLOBAL refers to, in the spelling of Python 3.

        Raises:
            CheckpointError: It is a function of torch that no file of weights needs.
        """
        module, last = PYTHON2_NAMES.get((module, last)) or (PYTHON2_MODULES.get(module, module), last)
        name = f"{module}.{last}"
        if len(name) > MAX_NAME:
            raise _refusal_error(self._path, f"it names something of {len(name):,} characters")
        is_type = module in ("torch", "torch.storage") and (
            last.endswith("Storage") or last.islower() or last[:1] == "Q"
        )
        is_torchs = module in _OF_TORCH and not is_type and name not in _CALLS and name != "torch.Tensor"
        # Names of other packages pass: torch refuses them itself, or they are read as inert data (see `objects`).
        if is_torchs or name == "builtins.bytearray":  # torch would call these
            raise CheckpointError(
                f"'{self._path}' holds more than tensors ({name}), and reading it could take any memory or run code "
                "from it. On a machine where you trust the file, load it yourself and write "
                "torch.save(model.state_dict(), …)."
            )
        return _Global(name)

    def _apply_call(self, function: Any, arguments: Any) -> _Value:
        """Return the result of a call, of size 1 and as deep as its arguments.

        Raises:
            CheckpointError: It is a function of torch outside of `_CALLS`, or its arguments are unusual.
        """
        self._objects += 1
        name = function.name if isinstance(function, _Global) else ""
        items = arguments.items if isinstance(arguments, _Value) else None
        if name not in _CALLS and name.rpartition(".")[0] in _OF_TORCH:
            raise _refusal_error(self._path, f"it calls {name}")
        if name == "_codecs.encode" and (items is None or items[1:] != ("latin1",)):
            raise _refusal_error(self._path, "it calls _codecs.encode for another encoding than latin1")
        if name == "torch._tensor._rebuild_from_type_v2":  # calls the function that is its first argument
            inner = items[0] if items else None
            if not isinstance(inner, _Global) or not inner.name.startswith("torch._utils._rebuild_"):
                raise _refusal_error(self._path, f"it calls {name} for something else than tensors")
        return _Value(1, arguments.depth) if isinstance(arguments, _Value) else _ANY_VALUE

    def _check_storage(self, identity: Any) -> None:
        """Check that a storage claims no more bytes than the file has for it.

        Args:
            identity: The tuple ("storage", type, key, device, number of elements).

        Raises:
            CheckpointError: It claims more, or is no such tuple.
        """
        items = identity.items if isinstance(identity, _Value) else None
        if items and items[0] == "module" and isinstance(self._records, int):
            return  # the source of a class in an older file, which nothing reads
        if items is None or len(items) < 5 or items[0] != "storage":
            raise _refusal_error(self._path, "it refers to something that is no storage")
        kind, key, count = items[1], items[2], items[4]
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Global) else ""
        if name not in _ITEM_BYTES or not isinstance(key, str) or type(count) is not int or count < 0:
            raise _refusal_error(self._path, f"it describes a storage by {name or kind!r}, {key!r}, {count!r}")
        # Older files have no record for each storage, so all claims together must fit into the file. A storage that
        # is referred to again with the same size is counted once.
        available = self._records if isinstance(self._records, int) else self._records.get(key, 0)
        claimed = count * _ITEM_BYTES[name]
        self._claimed += 0 if self._claims.get(key) == claimed else claimed
        self._claims[key] = claimed
        if claimed > available or (isinstance(self._records, int) and self._claimed > available):
            reason = f"the storage '{key[:40]}' claims {count:,} × {_ITEM_BYTES[name]} bytes of {available:,}"
            raise _refusal_error(self._path, reason)


def _refusal_error(path: Path, reason: str) -> CheckpointError:
    return unreadable_error(path, reason, "Get or make the file again.")


def no_pickle_error(path: Path) -> CheckpointError:
    """Return the error for a file that is no pickle, or one that holds no tensors."""
    return unreadable_error(path, "UnpicklingError: no pickle that holds tensors", EXPECTED_TORCH)
