"""Read a file that holds tensors and other objects: NumPy numbers, dates, paths, namespaces, configurations.

torch's weights-only unpickler refuses all of these, although most training checkpoints contain one. Here they are read
with the inert unpickler, which imports and calls nothing, and become plain data or None. Names are accepted by an
allowlist: those of Python, NumPy and torch that stand for data, and classes of other packages, of which only the state
is read. A file that names anything else of Python (`os.getcwd`, `builtins.print`) is refused, although nothing would
run: such a file is no checkpoint.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.foreign.restricted_unpickler import Stub, read_inert
from regraft.checkpoint.foreign.state_dicts import DEPTH, WRAPPERS, may_hold_weights
from regraft.errors import CheckpointError

# fmt: off
DATA: Mapping[str, frozenset[str]] = {  # module of Python → its names that stand for data
    "builtins": frozenset((
        "set", "frozenset", "slice", "complex", "range", "xrange", "object", "list", "dict", "tuple", "int", "long",
        "float", "str", "unicode", "bytes", "bool", "Ellipsis", "NotImplemented", "type",
    )),
    "collections": frozenset(("OrderedDict", "defaultdict", "Counter", "deque", "ChainMap", "UserDict", "UserList")),
    "argparse": frozenset(("Namespace",)),
    "types": frozenset(("SimpleNamespace", "MappingProxyType")),
    "datetime": frozenset(("datetime", "date", "time", "timedelta", "timezone")),
    "zoneinfo": frozenset(("ZoneInfo", "ZoneInfo._unpickle")),
    "decimal": frozenset(("Decimal",)),
    "fractions": frozenset(("Fraction",)),
    "uuid": frozenset(("UUID", "SafeUUID")),
    "copyreg": frozenset(("_reconstructor", "__newobj__")),
    "_codecs": frozenset(("encode",)),
    "enum": frozenset(("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag")),
    "array": frozenset(("array", "_array_reconstructor")),
    "re": frozenset(("_compile",)),
    "functools": frozenset(("partial",)),
    "logging": frozenset(("getLogger", "Logger")),
    "typing": frozenset(("Any", "List", "Dict", "Tuple", "Optional", "Union")),
}
PATHS = frozenset(("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"))
# fmt: on
LIBRARIES = ("torch.nn.", "torch.optim.", "torch.distributions.", "numpy.random.")  # their objects become None
NUMPY_CALLS = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
NUMPY_NAMES = ("scalar", "_reconstruct", "_frombuffer")
MAX_NUMBER_BYTES = 16  # of one element of an array


def read_beside_objects(path: Path) -> Any:
    """Read a file of torch.save as dicts, lists, plain values and tensors; every other object becomes None.

    Raises:
        CheckpointError: It is damaged, names something that is not data, or holds its weights in an object: a whole
            module, or a tensor subclass of another library.
    """

    def require_data(name: str) -> None:
        if not is_data(name):
            raise _more_than_tensors_error(path, name)

    content = read_inert(path, require_data)
    if isinstance(content, Stub) and not content.entries:
        raise _more_than_tensors_error(path, content.origin)
    return _to_plain(path, content, (), {})


def _more_than_tensors_error(path: Path, name: str) -> CheckpointError:
    """Return the error for a file whose weights cannot be loaded without running code from it."""
    return CheckpointError(
        f"'{path}' holds more than tensors ({name}), and reading it would run code from it. Its tensors can be taken "
        f"out without running any: `regraft convert {path.name} OUT.safetensors --tensors-only`."
    )


def is_data(name: str) -> bool:
    """Return whether a name in a pickle stands for data, or for a class of which only the state is read.

    >>> [is_data(name) for name in ("argparse.Namespace", "my_project.config.Config", "os.getcwd", "builtins.print")]
    [True, True, False, False]
    """
    module, _, last = name.rpartition(".")
    top = name.partition(".")[0]
    if top in DATA or top in sys.stdlib_module_names:
        return last in DATA.get(module, ()) or (top == "pathlib" and last in PATHS)
    if top == "torch":
        return name.startswith(LIBRARIES) or name in ("torch.Generator", "torch._C.Generator", "torch.Tensor")
    if top == "numpy":
        return name.startswith(LIBRARIES) or module == "numpy" or (module in NUMPY_CALLS and last in NUMPY_NAMES)
    return "." in name


def _to_plain(path: Path, value: Any, place: tuple[str, ...], known: dict[int, Any]) -> Any:
    """Replace objects by their entries or None; NumPy arrays of a state dict become tensors.

    Args:
        path: The file, for the message.
        value: An unpickled value.
        place: The keys that lead to it.
        known: Identity of a converted value → its result, as values may be shared.

    Raises:
        CheckpointError: An object in the place of the weights holds tensors, as a whole module does; or a tensor is of
            another class.
    """
    if isinstance(value, (list, tuple)) and len(place) <= DEPTH:
        return [_to_plain(path, item, (*place, str(position)), known) for position, item in enumerate(value)]
    entries = value.entries if isinstance(value, Stub) else value
    if isinstance(value, Stub) and not entries:
        if place and place[-1] in WRAPPERS and may_hold_weights(".".join(place)) and _holds_tensors(value):
            raise _more_than_tensors_error(path, value.origin)
        return None
    if not isinstance(entries, Mapping) or len(place) > DEPTH:
        return value if not isinstance(value, Stub) else None
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = None  # an object that contains itself ends here
    is_state_dict = any(isinstance(item, torch.Tensor) for item in entries.values())
    arrays = {key: array for key, item in entries.items() if (array := _array_to_tensor(item)) is not None}
    # Arrays beside other values are statistics of a training; a dict of arrays and tensors alone is a state dict.
    if arrays and len(arrays) + sum(isinstance(item, torch.Tensor) for item in entries.values()) == len(entries):
        entries = {**entries, **arrays}
    if is_state_dict and may_hold_weights(".".join(place)):
        for key, item in entries.items():
            if isinstance(item, Stub) and _holds_tensors(item):
                raise CheckpointError(
                    f"'{path}' holds '{key}' as a {item.origin}, a tensor of another class, as quantized weights are. "
                    "Expected plain tensors. Load the file with the library that it is from, dequantize it, and keep "
                    "the result with torch.save."
                )
    known[id(value)] = {key: _to_plain(path, item, (*place, str(key)), known) for key, item in entries.items()}
    return known[id(value)]


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """Return whether an object is or holds a tensor, down to the depth at which files keep weights."""
    if isinstance(value, torch.Tensor) or depth > DEPTH:
        return isinstance(value, torch.Tensor)
    items: Iterable[Any] = ()
    if isinstance(value, Stub):
        items = (*value.arguments, value.state, *value.entries.values(), *value.elements)
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    return any(_holds_tensors(item, depth + 1) for item in islice(items, 10_000))


def _array_to_tensor(value: Any) -> torch.Tensor | None:
    """Return a pickled NumPy array of numbers as a tensor; None for anything else."""
    import numpy as np

    if not isinstance(value, Stub) or not value.origin.endswith("multiarray._reconstruct"):
        return None
    try:
        _, shape, described, is_fortran, raw = value.state
        dtype = np.dtype(str(described.arguments[0])).newbyteorder(described.state[1])
        is_sound = dtype.kind in "fiub" and dtype.itemsize <= MAX_NUMBER_BYTES and isinstance(raw, bytes)
        if not is_sound or math.prod(shape) * dtype.itemsize != len(raw):
            return None
        array = np.frombuffer(raw, dtype).reshape(shape, order="F" if is_fortran else "C")
        return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, AttributeError, IndexError):
        return None
