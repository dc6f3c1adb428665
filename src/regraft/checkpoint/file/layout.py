"""The layout of a safetensors file: which of its bytes belong to which tensor.

The file consists of eight bytes with the length of a JSON text, the JSON text, and the bytes of the tensors. Nothing in
this module reads a tensor.
"""

import json
import math
import os
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.foreign.kinds import describe_folder, describe_weights, require_weights
from regraft.errors import CheckpointError
from regraft.wording import for_caller

HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
ENTRY_LIMIT = 2_000_000  # values in a JSON text; parsed, they take at most 256 MiB
DIMENSION_LIMIT = 64
NAME_LIMIT = 1000  # characters
SIZE_LIMIT = 2**63  # of a dimension, and of a file
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
UNSUPPORTED = ("F6_E2M3", "F6_E3M2")  # dtypes of the safetensors library that torch does not have
PACKED = {"F4": 2}  # numbers in one element of torch; the last dimension is that many times as long in the file


@dataclass(frozen=True)
class TensorEntry:
    """The position and type of one tensor in a file.

    Attributes:
        dtype: Type of its elements.
        shape: Shape in torch.
        start: Offset of its first byte from the beginning of the file.
        size: Number of its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def parse_json(text: bytes | str) -> Any:
    """Parse JSON from a file of unknown origin, in at most 256 MiB of memory.

    Raises:
        ValueError: It is not JSON in UTF-8, is nested too deep, holds too many values, or has a key twice.
    """
    # Counted in the text, before anything is parsed: each value has one of these marks in front of it.
    marks = (b"[", b"{", b",", b":") if isinstance(text, bytes) else ("[", "{", ",", ":")
    if sum(text.count(mark) for mark in marks) > ENTRY_LIMIT:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"more than {ENTRY_LIMIT:,} values")
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique_dict)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, and refuse duplicate keys: readers disagree on which of them counts."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("an entry is there twice")
    return entries


def open_file(path: Path) -> FileIO:
    """Open a file of a checkpoint for reading.

    Raises:
        CheckpointError: It does not exist.
    """
    if path.is_dir():
        raise CheckpointError(f"no checkpoint in the folder '{path}': {describe_folder(path)}")
    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of a checkpoint.")
    return path.open("rb", buffering=0)


def read_start(path: Path, file: FileIO | None = None) -> tuple[dict[str, Any], int]:
    """Read the JSON text of a safetensors file; no byte of a tensor is read.

    Args:
        path: The file.
        file: The same file, at its beginning, where it is open already.

    Returns:
        The JSON object, and the offset at which the bytes of the tensors start.

    Raises:
        CheckpointError: The file does not exist, or is not a safetensors file.
    """
    with nullcontext(file) if file is not None else open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, HEADER_LIMIT_BYTES):
            is_cut_off = file.read(1) == b"{"  # where the JSON text of the header begins
            if not is_cut_off:
                require_weights(path)
            if not is_cut_off and (what := describe_weights(path)) is not None:
                use = for_caller(
                    python=f"Load it into a model of your own with load_weights(model, {str(path)!r})",
                    command="Train with it (regraft train DATA --model NAME --weights FILE)",
                )
                raise CheckpointError(
                    f"'{path}' is {what}: weights without an architecture. {use}, or write a checkpoint with `regraft "
                    f"convert {path} OUT.safetensors --model NAME`."
                )
            raise CheckpointError(
                f"'{path}' is no safetensors file, or it is cut off ({size:,} bytes). Expected a file written by "
                "`regraft train` or regraft.save."
            )
        raw = file.read(length)
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"'{path}' is no safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is no safetensors file: its header is not a JSON object.")
    return content, 8 + length


def read_layout(path: Path) -> dict[str, TensorEntry]:
    """Read the position and type of each tensor of a safetensors file, by name; no byte of a tensor is read.

    Raises:
        CheckpointError: The file does not exist, is not a safetensors file, or its tensors overlap, leave gaps, or
            exceed the file.
    """
    with open_file(path) as file:
        return layout_of(path, file, *read_start(path, file))


def layout_of(path: Path, file: FileIO, content: dict[str, Any], start: int) -> dict[str, TensorEntry]:
    """Return the position and type of each tensor, of a file whose start was read; see `read_layout`."""
    content = dict(content)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged_error(path, "its metadata are not text")
    if any(len(name) > NAME_LIMIT for name in content):
        raise damaged_error(path, f"it has a name of more than {NAME_LIMIT:,} characters")
    entries = {name: _parse_entry(path, name, described, start) for name, described in content.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise damaged_error(path, f"the bytes of '{name}' do not follow those of the tensor before it")
        end += entry.size
    size = os.fstat(file.fileno()).st_size
    if size != end:
        raise damaged_error(path, f"it has {size:,} bytes, expected {end:,}")
    return entries


def _parse_entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    """Parse the JSON entry of one tensor; `start` is the offset of the tensors' bytes.

    Raises:
        CheckpointError: Its dtype, shape and offsets are malformed, or contradict each other.
    """
    try:
        if fields["dtype"] in UNSUPPORTED:
            raise CheckpointError(
                f"'{path}' holds '{name[:200]}' as {fields['dtype']}, for which torch has no dtype. "
                f"Expected one of {', '.join(DTYPES)}. Convert it where the file was made."
            )
        dtype, shape, (first, last) = DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
        sizes = [*shape, first, last]
        is_sound = len(shape) <= DIMENSION_LIMIT and all(type(size) is int and 0 <= size < SIZE_LIMIT for size in sizes)
        packed = PACKED.get(fields["dtype"], 1)
        if is_sound and packed > 1 and shape and shape[-1] % packed == 0:
            shape = [*shape[:-1], shape[-1] // packed]
        elif packed > 1:
            is_sound = False
        if is_sound and last - first == math.prod(shape) * dtype.itemsize:
            return TensorEntry(dtype, tuple(shape), start + first, last - first)
    except (KeyError, TypeError, ValueError):
        pass
    raise damaged_error(path, f"dtype, shape and offsets of '{name[:200]}' do not agree, or are not known")


def damaged_error(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file whose content contradicts itself."""
    return CheckpointError(f"'{path}' is damaged: {reason}. Get or make it again.")
