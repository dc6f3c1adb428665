"""Read pickled tensors without the code that they were pickled with.

A normal unpickler imports and calls what a file names. The unpickler here has its own functions for the few names that
rebuild tensors. Every other name becomes an empty class, `Stub`, that stores its arguments and does nothing. Nothing is
imported, so no code of the file or of its libraries runs.
"""

import itertools
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from regraft.checkpoint.foreign.kinds import first_line, unreadable_error
from regraft.checkpoint.foreign.state_dicts import DEPTH
from regraft.errors import CheckpointError
from regraft.torch_internals import PYTHON2_MODULES, PYTHON2_NAMES

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DEPTH_LIMIT = 200  # layers within layers
VISIT_LIMIT = 200_000  # layers in total; an object that occurs twice counts twice
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value in files of older torch.save; torch.serialization.MAGIC_NUMBER

Check = Callable[[str], None]  # called with a name that becomes a Stub; raises to refuse it
Fetch = Callable[[str, torch.dtype, int], torch.Tensor]  # key, dtype, number of elements → flat tensor


class Stub:
    """A placeholder for an object of any class. It stores arguments, state, entries and elements, and runs nothing."""

    origin = ""

    def __new__(cls, *arguments: Any, **_: Any) -> "Stub":
        """Create a placeholder from the arguments of a pickled object."""
        stub = super().__new__(cls)
        stub.arguments, stub.state, stub.entries, stub.elements = arguments, {}, {}, []
        return stub

    arguments: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    elements: list[Any]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Store one element, as pickles of lists add it."""
        self.elements.append(value)

    add = append  # as pickles of sets add it


class _Function:
    """A function that the unpickler may call; a file cannot set attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function is given a state")


class _PlainDict(dict[Any, Any]):
    """An ordered dict without the attributes of the pickled one, such as a state dict's `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


class InertUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and plain values; everything else becomes `Stub`."""

    def __init__(self, file: IO[bytes], fetch: Fetch, check: Check = lambda name: None) -> None:
        super().__init__(file, encoding="utf-8")
        self._fetch, self._check = fetch, check

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; nothing is imported."""
        module, name = PYTHON2_NAMES.get((module, name)) or (PYTHON2_MODULES.get(module, module), name)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        function = KNOWN.get((module, name))
        if function is not None:
            return _Function(function)
        self._check(f"{module}.{name}")
        return type("Stub", (Stub,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """Return the flat tensor of a storage outside of the pickle, or the stand-in of a class."""
        if pid[0] == "module":  # a class with its source text, in older files
            return pid[1]
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not _is_count(count):
            raise pickle.UnpicklingError("a reference that is no storage of a known dtype")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, as torch before 0.4 wrote them")
        return self._fetch(str(key), dtype, count)


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Read the parameters and buffers of a TorchScript archive; none of its code is compiled or run.

    Raises:
        CheckpointError: It is damaged, or not such an archive.
    """
    return tensors_within(read_inert(path))


def read_pickled(path: Path) -> Any:
    """Read any file of torch.save: modules become dicts of their tensors, other objects are left out.

    Raises:
        CheckpointError: It is damaged, or not such a file.
    """
    return _replace_modules(read_inert(path), {})


def read_inert(path: Path, check: Check = lambda name: None) -> Any:
    """Read any file of torch.save, with a `Stub` for each object that is not plain data.

    Args:
        path: The file.
        check: Called with each name that becomes a `Stub`; may raise a CheckpointError.

    Raises:
        CheckpointError: It is damaged, or not such a file, or `check` refuses it.
    """
    try:
        return _from_archive(path, check) if zipfile.is_zipfile(path) else _from_legacy(path, check)
    except CheckpointError:
        raise
    except Exception as error:  # an unpickler may raise anything on damaged data
        advice = "Expected a whole file that torch wrote; get or make it again."
        raise unreadable_error(path, first_line(error), advice) from error


def tensors_within(value: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a module under the names that its state dict would have.

    Raises:
        CheckpointError: Its layers contain themselves.
    """
    tensors: dict[str, torch.Tensor] = {}
    visits = itertools.count()

    def collect(value: Any, prefix: str, depth: int) -> None:
        """Add the tensors of a layer and of the layers in it."""
        if depth > DEPTH_LIMIT or next(visits) > VISIT_LIMIT:
            raise CheckpointError(
                f"layers lie within layers more than {DEPTH_LIMIT} deep, or are more than {VISIT_LIMIT:,}: this is no "
                "network. Expected a module that torch.save or torch.jit.save wrote."
            )
        state = value.state if isinstance(value, Stub) else value
        if not isinstance(state, Mapping):
            return
        if "_modules" in state and "_parameters" in state:  # a pickled nn.Module
            left_out = state.get("_non_persistent_buffers_set") or ()
            own = {**_as_dict(state["_parameters"]), **_as_dict(state.get("_buffers"))}
            members = {key: member for key, member in own.items() if key not in left_out}
            members |= _as_dict(state["_modules"])
        else:  # a scripted module, whose parameters, buffers and layers are attributes
            members = dict(state)
        for key, member in members.items():
            if isinstance(member, torch.Tensor):
                tensors[f"{prefix}{key}"] = member
            elif isinstance(member, Stub):
                collect(member, f"{prefix}{key}.", depth + 1)

    collect(value, "", 0)
    return tensors


def _replace_modules(content: Any, results: dict[int, Any], depth: int = 0) -> Any:
    """Replace modules by dicts of their tensors, also in dicts within; `results` maps object identities to results."""
    if not isinstance(content, (Stub, Mapping)) or depth > DEPTH:
        return content
    if id(content) not in results:
        results[id(content)] = {}  # an object that contains itself ends here
        if isinstance(content, Stub):
            results[id(content)] = tensors_within(content) or dict(content.entries)
        else:
            results[id(content)] = {key: _replace_modules(value, results, depth + 1) for key, value in content.items()}
    return results[id(content)]


def _as_dict(value: Any) -> dict[Any, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _from_archive(path: Path, check: Check) -> Any:
    """Unpickle `data.pkl` of the zip archives that torch.save and torch.jit.save write."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        main = next((name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if main is None:
            raise CheckpointError(f"'{path}' is a zip archive without a data.pkl, so torch did not write it.")
        root = main.removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder").strip() != b"little":
            raise CheckpointError(f"'{path}' was written on a machine with another byte order.")
        storages: dict[str, torch.Tensor] = {}

        def fetch(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            if key not in storages:
                info = _require_uncompressed(members[f"{root}data/{key}"])
                if info.file_size + sum(flat.nbytes for flat in storages.values()) > size:
                    raise pickle.UnpicklingError("its storages are larger than the file")
                storages[key] = torch.frombuffer(bytearray(archive.read(info)) or bytearray(1), dtype=torch.uint8)
            return storages[key][: count * dtype.itemsize].view(dtype)

        with archive.open(_require_uncompressed(members[main])) as file:
            return InertUnpickler(file, fetch, check).load()


def _require_uncompressed(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Return an entry unchanged if it is not compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"'{info.filename}' is compressed, which torch never writes")
    return info


def _from_legacy(path: Path, check: Check) -> Any:
    """Unpickle a file of torch.save before 1.6: consecutive pickles, then the bytes of each storage."""
    size = path.stat().st_size
    storages: dict[str, tuple[torch.dtype, torch.Tensor]] = {}

    def fetch(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        if key not in storages:
            if count * dtype.itemsize > size - sum(flat.nbytes for _, flat in storages.values()):
                raise pickle.UnpicklingError(f"the storage {key} is larger than the file")
            storages[key] = dtype, torch.zeros(count, dtype=dtype)
        return storages[key][1]

    with path.open("rb") as file:
        if InertUnpickler(file, fetch).load() != LEGACY_MAGIC:
            raise pickle.UnpicklingError("it does not begin as torch.save begins")
        for _ in range(2):  # the protocol, and the properties of the machine
            InertUnpickler(file, fetch).load()
        content = InertUnpickler(file, fetch, check).load()
        for key in InertUnpickler(file, fetch).load():
            count = int.from_bytes(file.read(8), "little")
            dtype, flat = storages[key]
            raw = file.read(flat.nbytes)
            if count != flat.numel() or len(raw) != flat.nbytes:
                raise pickle.UnpicklingError(f"the storage {key} is cut off")
            if raw:
                flat.copy_(torch.frombuffer(bytearray(raw), dtype=dtype))
    return content


def _rebuild_tensor(
    flat: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> torch.Tensor:
    """Rebuild a tensor from its storage; torch checks that it lies inside."""
    if not all(_is_count(number) for number in (offset, *size, *stride)) or math.prod(size) > max(flat.numel(), 1):
        raise pickle.UnpicklingError(f"a tensor {tuple(size)} does not lie inside its storage")
    return torch.as_strided(flat, tuple(size), tuple(stride), offset)


def _rebuild_view(flat: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Rebuild a tensor of a dtype without a storage class of its own, such as eight-bit floats."""
    offset, size, stride, _, _, dtype = arguments[:6]
    if not isinstance(dtype, torch.dtype) or flat.nbytes % dtype.itemsize:
        raise pickle.UnpicklingError("a tensor of no known dtype")
    return _rebuild_tensor(flat.view(dtype), offset, size, stride)


def _rebuild_typed(function: Any, kind: Any, arguments: Sequence[Any], *_: Any) -> Any:
    """Rebuild a tensor without its attributes; a tensor of a subclass becomes a `Stub`."""
    plain = function(*arguments) if isinstance(function, _Function) else None
    return plain if getattr(kind, "origin", "") == "torch.Tensor" else Stub(plain)


def _encode_latin1(text: str, encoding: str = "") -> bytes:
    """Return bytes that pickles of protocol 2 store as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another encoding than latin1")
    return text.encode("latin1")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _first_argument(value: Any, *_: Any) -> Any:
    return value


KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_view,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _first_argument,
    ("torch._utils", "_rebuild_parameter_with_state"): _first_argument,
    ("torch.jit._pickle", "restore_type_tag"): _first_argument,
    ("torch.jit._pickle", "build_tensorlist"): _first_argument,
    ("torch.jit._pickle", "build_intlist"): _first_argument,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _PlainDict,
    ("collections", "defaultdict"): lambda *_: _PlainDict(),
    ("collections", "Counter"): lambda counts=(), *_: _PlainDict(counts),
    ("_codecs", "encode"): _encode_latin1,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("torch", "device"): lambda *_: None,
    ("torch.serialization", "_get_layout"): lambda *_: None,
}
