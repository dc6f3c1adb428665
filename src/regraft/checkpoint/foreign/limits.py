"""Check the sizes that a file declares, by its header alone, before any library reads it.

A header may declare wrong sizes: more bytes than the file has, overlapping entries, a storage longer than its bytes.
Each declared size is compared with the size of the file. Reading a file that passes takes no more memory than the file
has bytes, plus `SLACK_BYTES`. `layout` does the same for safetensors files.
"""

import math
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, Any, cast

from regraft.checkpoint.file.format import is_safetensors
from regraft.checkpoint.file.layout import damaged_error, read_layout
from regraft.checkpoint.foreign.kinds import require_torch_zip
from regraft.checkpoint.foreign.pickle_check import check_legacy, check_pickle
from regraft.errors import CheckpointError

SLACK_BYTES = 192 * 2**20
DIRECTORY_LIMIT_BYTES = 8 * 2**20  # directory of a zip file: about 100,000 entries
PICKLE_LIMIT_BYTES = 64 * 2**20  # without the tensors, which are entries of their own
CODE_LIMIT_BYTES = 64 * 2**20  # code of a TorchScript archive, unpacked


def check_container(path: Path) -> None:
    """Check a file of weights by its header: safetensors, a zip file (of torch or NumPy), or an older file of torch.

    Raises:
        CheckpointError: It declares more than a file of its size can hold, or is damaged. No tensor was read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            _check_zip(path, file, size)
        elif is_safetensors(path):
            read_layout(path)
        else:
            check_legacy(path, file, size)


def _check_zip(path: Path, file: IO[bytes], size: int) -> None:
    try:
        if _directory_bytes(file, size) > DIRECTORY_LIMIT_BYTES:
            raise damaged_error(path, f"its list of entries takes more than {DIRECTORY_LIMIT_BYTES:,} bytes")
        with zipfile.ZipFile(file) as archive:
            _check_entries(path, archive, size)
            require_torch_zip(path, archive.namelist())
            if any(entry.filename.endswith(".npy") for entry in archive.infolist()):
                _check_arrays(path, archive, size)
            else:
                _check_records(path, file, archive, size)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and NumPy raise many types on malformed data
        raise damaged_error(path, f"it is no whole zip file ({type(error).__name__}: {str(error)[:120]})") from error


def _directory_bytes(file: IO[bytes], size: int) -> int:
    """Return the length of a zip file's directory: the largest of all lengths that the end of the file could state.

    Readers differ in which end record they use, so every candidate is considered.
    """
    file.seek(max(0, size - 2**16 - 256))
    end = file.read()
    end_records = [match.start() + 12 for match in re.finditer(b"PK\x05\x06", end)]
    zip64_records = [match.start() + 40 for match in re.finditer(b"PK\x06\x06", end)]
    lengths = [struct.unpack("<I", end[offset : offset + 4])[0] for offset in end_records if offset + 4 <= len(end)]
    lengths = [length for length in lengths if length != 0xFFFFFFFF]  # a placeholder: the zip64 record has the length
    lengths += [struct.unpack("<Q", end[offset : offset + 8])[0] for offset in zip64_records if offset + 8 <= len(end)]
    return max(lengths, default=0)


def _check_entries(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Check that names are unique and stay inside of the archive, and that each entry lies within the file."""
    names = set()
    for entry in archive.infolist():
        name = entry.filename
        parts = name.split("/")
        if "\\" in name or ".." in parts or parts[0] in ("", "~") or ":" in parts[0] or name != entry.orig_filename:
            raise damaged_error(path, f"it has an entry {name[:80]!r}, whose name leads out of it")
        if name in names:
            raise damaged_error(path, f"it has the entry {name[:80]!r} twice")
        names.add(name)
        if entry.header_offset + entry.compress_size > size or entry.flag_bits & 1:
            raise damaged_error(path, f"its entry {name[:80]!r} is encrypted, or is not in it as a whole")


def _check_records(path: Path, file: IO[bytes], archive: zipfile.ZipFile, size: int) -> None:
    """Check the entries of a file of torch, which compresses nothing but the code of TorchScript."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    packed = [entry for entry in entries.values() if entry.compress_type != zipfile.ZIP_STORED]
    wrong = next((entry for entry in packed if "code" not in entry.filename.split("/")), None)
    if wrong is not None:
        raise damaged_error(path, f"its entry {wrong.filename[:80]!r} is compressed, which torch never does")
    if sum(entry.file_size for entry in packed) > CODE_LIMIT_BYTES:
        raise damaged_error(path, f"its code takes more than {CODE_LIMIT_BYTES:,} bytes unpacked")
    plain = [entry for entry in entries.values() if entry.compress_type == zipfile.ZIP_STORED]
    claimed = sum(entry.file_size for entry in plain)
    if claimed > size or any(entry.file_size != entry.compress_size for entry in plain):
        raise damaged_error(path, f"its entries take {claimed:,} bytes, and the file has {size:,}")
    for name, entry in entries.items():
        if name.rpartition("/")[2] != "data.pkl" or entry.compress_type != zipfile.ZIP_STORED:
            continue
        if entry.file_size > PICKLE_LIMIT_BYTES:
            reason = f"its entry {name!r} has {entry.file_size:,} bytes, {PICKLE_LIMIT_BYTES:,} are the most"
            raise damaged_error(path, reason)
        folder = name.removesuffix("data.pkl") + "data/"
        records = {
            key.removeprefix(folder): record.file_size for key, record in entries.items() if key.startswith(folder)
        }
        check_pickle(path, _read_stored(file, entry), records)


def _read_stored(file: IO[bytes], entry: zipfile.ZipInfo) -> bytes:
    """Read the bytes of an uncompressed entry without zipfile, as torch may write entries without a checksum."""
    file.seek(entry.header_offset)
    local = file.read(30)
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    file.seek(name_bytes + extra_bytes, 1)
    return file.read(entry.file_size)


def _check_arrays(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Check the arrays of an npz file: each by its header, and the sum of all."""
    import numpy as np

    claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > size + SLACK_BYTES:
        raise CheckpointError(
            f"'{path}' takes {claimed:,} bytes unpacked, and {size:,} packed, which weights never do. "
            "Where you trust it, unpack it yourself and keep it with numpy.savez."
        )
    for entry in archive.infolist():
        if not entry.filename.endswith(".npy"):
            continue
        with archive.open(entry) as opened:
            array = cast(Any, opened)
            version = np.lib.format.read_magic(array)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(array)
        if dtype.hasobject:
            raise CheckpointError(
                f"'{path}' holds Python objects in {entry.filename!r}, and reading them would run code from it. "
                "Expected arrays of numbers."
            )
        if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize > entry.file_size:
            reason = f"{entry.filename!r} has the shape {str(shape)[:80]}, and {entry.file_size:,} bytes"
            raise damaged_error(path, reason)
