"""Identify files that are not readable as weights: a pointer, a web page, an archive, a file of another framework.

A file is identified by its first bytes, and by its name only for formats without a signature. Messages include a
remedy, because the usual causes are a failed download and a file of another framework.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.errors import CheckpointError
from regraft.wording import for_caller

HEAD_BYTES = 64 * 2**10
MAX_EXCERPT = 120  # characters of a text file that are quoted

EXPECTED = "Expected safetensors, a file that torch.save wrote, npz, or an index of such files."
UNPACK = "Unpack it, and give the file with the weights."
FLAX = "Load it with flax.serialization, and keep its arrays with numpy.savez or safetensors."
KERAS = "Load it with Keras, and keep its arrays with numpy.savez under the names of the network."
TENSORFLOW = "Load it with TensorFlow, and keep its arrays as npz."
NAMELESS = "Keep the arrays under the names of the network with numpy.savez."
UNPICKLE = "Where you trust it, unpickle it yourself and keep its weights with torch.save or numpy.savez."
AGAIN = "Check the address and your rights to it, and download it again."

MAGIC: tuple[tuple[int, bytes | tuple[bytes, ...], str, str], ...] = (  # (offset, bytes, description, advice)
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write (.h5)", KERAS),
    (4, b"TFL3", "a TensorFlow Lite model", "Give the weights that it was made from."),
    (0, b"GGUF", "a GGUF file of llama.cpp, mostly quantized", "Give the weights that it was made from."),
    (0, (b"ggml", b"tjgg", b"lmgg"), "a GGML file of llama.cpp", "Give the weights that it was made from."),
    (0, b"\x93NUMPY", "one NumPy array without a name (.npy)", NAMELESS),
    (0, b"SQLite format 3\x00", "an SQLite database", EXPECTED),
    (0, b"\x89PNG", "a picture (PNG)", EXPECTED),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", EXPECTED),
    (0, b"%PDF", "a PDF document", EXPECTED),
)
BY_NAME: dict[str, tuple[str, str]] = {  # formats without a signature: suffix → (description, advice)
    ".onnx": ("an ONNX model", "Give the weights that it was exported from."),
    ".mlmodel": ("a Core ML model", "Give the weights that it was converted from."),
    ".pb": ("a TensorFlow graph (SavedModel or frozen)", TENSORFLOW),
    ".msgpack": ("a Flax checkpoint (msgpack)", FLAX),
    ".index": ("the index of a TensorFlow checkpoint", TENSORFLOW),
    ".h5": ("not the HDF5 file that its name says", "Get it again."),
}
ANSWER = re.compile(r"(error\b|\d{3}:? |not found|entry not found|access (denied|to)|forbidden|unauthorized|invalid )")
TENSORFLOW_DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")
FOLDERS: tuple[tuple[str, str, str], ...] = (  # (file in the folder, description of the folder, advice)
    ("saved_model.pb", "a TensorFlow SavedModel", TENSORFLOW),
    (".metadata", "a checkpoint of torch.distributed", "Make one file of it with torch.distributed.checkpoint."
     "format_utils.dcp_to_torch_save."),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "Make one file of it with the zero_to_fp32.py in it."),
    ("adapter_config.json", "an adapter of peft", "Merge it into its base model with merge_and_unload, and save that."),
    ("Manifest.json", "a Core ML package", "Give the weights that it was converted from."),
    ("checkpoint", "a checkpoint of TensorFlow or Flax", "Load it there, and keep its arrays as npz."),
    ("_CHECKPOINT_METADATA", "a checkpoint of Orbax (JAX)", "Load it there, and keep its arrays as npz."),
    ("tf_model.h5", "a model for TensorFlow", "Get the weights for torch."),
    ("flax_model.msgpack", "a model for Flax", "Get the weights for torch."),
)  # fmt: skip
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th", ".npz")


def require_weights(path: Path) -> None:
    """Refuse a file that is recognizably not a file of weights.

    Raises:
        CheckpointError: It is of another kind, which the message names.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    described = _identify(path, head)
    if described is not None:
        raise unreadable_error(path, f"it is {described[0]}", described[1])


def describe_weights(path: Path) -> str | None:
    """Return which library wrote a file of weights, by its first bytes; None for any other file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[:1] == b"\x80":
        return "a file of torch.save"
    names = zip_names(path)
    if names is None:
        return None
    return "an npz file" if is_npz(names) else "a file of torch.save"


def zip_names(path: Path) -> list[str] | None:
    """Return the names in a zip archive; None for any other file, and for one that is damaged."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None


def is_npz(names: list[str]) -> bool:
    """Return whether a zip archive with these names is one of NumPy."""
    return bool(names) and all(name.endswith(".npy") for name in names)


def unreadable_error(path: Path, reason: str, advice: str) -> CheckpointError:
    """Return the error for a file that cannot be read as weights."""
    return CheckpointError(f"'{path}' cannot be read as weights: {reason}. {advice}")


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, of which at most 200 characters."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def describe_folder(path: Path) -> str:
    """Describe a folder without readable weights, with advice, as the end of an error message."""
    for name, what, advice in FOLDERS:
        if (path / name).exists():
            return f"it is {what}. {advice}"
    if (path / "last").is_dir():
        call = for_caller(
            python=f"regraft.fit(…, out={str(path)!r}, resume=True)", command=f"regraft train --resume {path}"
        )
        return f"it is that of a run which has not kept a model yet. Continue it: {call}"
    files = sorted(file.name for file in path.iterdir() if file.name.endswith(WEIGHTS))
    if files:
        return f"it holds {first_names(files)}. Give the path of one of them."
    return "it holds no file of weights. Give the path of a file."


def _identify(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return description and advice for a file that is not readable; None for one that may be."""
    if not head:
        return "empty (0 bytes)", "The download or the copy failed: get it again."
    for offset, magic, what, advice in MAGIC:
        if head.startswith(magic, offset):
            return what, advice
    if head[8:10] == b'{"' and b'"dtype"' in head[:1000]:
        return "a safetensors file that is cut off in its header", "The download or the copy failed: get it again."
    text = _decode_text(head)
    if text is not None:
        return _identify_text(path, text)
    if TENSORFLOW_DATA.search(path.name):
        return "a part of a TensorFlow checkpoint", TENSORFLOW
    is_torch = head[:1] == b"\x80" or head[8:9] == b"{"  # a pickle, or the header of a safetensors file
    if not is_torch and path.suffix.lower() in BY_NAME:
        return BY_NAME[path.suffix.lower()]
    if re.match(rb"\x08[\x01-\x20]\x12.[\w.\-]{2,}", head, re.DOTALL):  # ir_version and producer_name, as protobuf
        return BY_NAME[".onnx"]
    if head[:1] == b"\x80" and not _is_torch_pickle(head):
        return "a pickle that torch.save did not write", UNPICKLE
    if (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)) and head[8:9] != b"{":
        return BY_NAME[".msgpack"]  # these first bytes are maps in msgpack
    return None


def _is_torch_pickle(head: bytes) -> bool:
    """Return whether a file begins as those of torch.save before 1.6: with a pickle of the magic number alone."""
    return b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:40] or len(head) < 16


def require_torch_zip(path: Path, names: list[str]) -> None:
    """Check that a zip file with these entries was written by torch or NumPy.

    Raises:
        CheckpointError: It is of another kind, which the message names.
    """
    described = _identify_zip([name for name in names if not name.endswith("/")])
    if described is not None:
        raise unreadable_error(path, f"it is {described[0]}", described[1])


def _identify_zip(names: list[str]) -> tuple[str, str] | None:
    """Return description and advice for a zip file of other tools; None for one of torch or NumPy."""
    if any(name.rpartition("/")[2] == "data.pkl" for name in names) or any(name.endswith(".npy") for name in names):
        return None
    if any(name.endswith("model.weights.h5") for name in names):
        return "a Keras model (.keras)", KERAS
    if any(name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in names):
        return "a program of torch.export (.pt2)", "Give the state dict of the network that it was exported from."
    if any("/.data/" in f"/{name}" for name in names):
        return "a package of torch.package", "Load it where you trust it, and keep model.state_dict() with torch.save."
    inside = [name for name in names if name.endswith(WEIGHTS)]
    held = f"; in it: {first_names(inside)}" if inside else ""
    return f"a zip archive of {len(names)} files that neither torch nor NumPy wrote{held}", UNPACK


def _decode_text(head: bytes) -> str | None:
    """Return the beginning of a file as text; None for a binary file."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # closer to the end, the read may have cut a character
            return None
        text = head[: error.start].decode("utf-8-sig")
    controls = sum(character < " " and character not in "\t\r\n\f\x1b" for character in text)
    return text if not controls and text.strip() else None


def _identify_text(path: Path, text: str) -> tuple[str, str]:
    """Return description and advice for a text file."""
    start = text.lstrip()
    lower = start[:1000].lower()
    if start.startswith("version https://git-lfs.github.com/spec/"):
        size = re.search(r"^size (\d{1,15})$", text, re.MULTILINE)
        held = f" to {int(size[1]):,} bytes" if size else ""
        return f"a Git LFS pointer{held}, not the weights themselves", "Run `git lfs pull` in its repository."
    if lower.startswith(("<!doctype html", "<html", "<head", "<body", "<!--")) or "<html" in lower:
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
        named = f" ({_excerpt(title[1])})" if title and title[1].strip() else ""
        return f"a web page{named}", "Download the file itself: the link leads to a page about it or to a login."
    if start.startswith("<"):
        code = re.search(r"<Code>(.*?)</Code>", text)
        named = f" with the answer of a server, {_excerpt(code[1])}" if code else ""
        return f"XML{named}", AGAIN
    if start[:1] in "{[":
        return _identify_json(path, start)
    if start.startswith("model_checkpoint_path:"):
        return "the list of a TensorFlow checkpoint", TENSORFLOW
    if ANSWER.match(lower):
        return f"the answer of a server, '{_excerpt(start)}'", AGAIN
    return f"text, which begins '{_excerpt(start)}'", EXPECTED


def _identify_json(path: Path, text: str) -> tuple[str, str]:
    """Return description and advice for a JSON file."""
    content: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text) if len(text) < HEAD_BYTES // 2 else None
    if isinstance(content, dict):
        answer = next((content[key] for key in ("error", "message", "detail", "errors") if key in content), None)
        if answer is not None:
            return f"JSON with the answer of a server, '{_excerpt(str(answer))}'", AGAIN
        if "weight_map" in content:
            return "an index of weights under another name", f"Call it '{path.stem}.index.json'."
        return f"JSON with {first_names(map(str, content))}, as a configuration", EXPECTED
    return "JSON", EXPECTED


def _excerpt(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= MAX_EXCERPT else f"{plain[:MAX_EXCERPT]}…"


def first_names(names: Iterable[str]) -> str:
    """List the first three names, and the number of the others."""
    known = list(names)
    shown = ", ".join(repr(name[:80]) for name in known[:3])
    return shown if len(known) <= 3 else f"{shown} and {len(known) - 3} more"
