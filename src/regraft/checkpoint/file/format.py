"""The file format: the header of a checkpoint beside its tensors. `docs/format.md` specifies it.

A checkpoint is one safetensors file, or several with an index. The metadata of the file or of the index has one key,
`regraft`, with a JSON document of the fields of `Header`. Any safetensors reader can read the tensors; none of them
runs code.
"""

import hashlib
import platform
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from regraft.card import Card
from regraft.checkpoint.file.layout import HEADER_LIMIT_BYTES, parse_json, read_start
from regraft.errors import CheckpointError

VERSION = "1.0"
KEY = "regraft"
DOCUMENT_LIMIT_BYTES = 32_000_000
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
RUN_CHECKPOINT, RUN_STATES = "model.safetensors", "last"  # in the folder of a run
REGISTERED = re.compile(r"(timm/)?\w+@[\w.]+", re.ASCII)  # NAME@WEIGHTS of the zoo; matches no path and no code
INDEX_ADVICE = 'Expected {"weight_map": {NAME: FILE}} with files beside it. Get or make it again.'
DIGEST = r"^[0-9a-f]{64}$"


class Base(BaseModel):
    """The base of a delta.

    Attributes:
        kind: `registered` weights, or a `file`.
        name: `NAME@WEIGHTS` as in `resnet18@IMAGENET1K_V1`, or the name of a file without a folder.
        digest: `Header.digest` of the base.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: Literal["registered", "file"]
    name: str
    digest: str = Field(pattern=DIGEST)

    @model_validator(mode="after")
    def _leads_nowhere(self) -> "Base":
        if self.kind == "file" and not is_plain_name(self.name):
            raise ValueError(f"'{self.name}' is not the plain name of a file")
        if self.kind == "registered" and not REGISTERED.fullmatch(self.name):
            raise ValueError(f"'{self.name}' is not of the form NAME@WEIGHTS")
        return self

    def __str__(self) -> str:
        return f"{self.name} (digest {self.digest[:12]}…)"


class Header(BaseModel):
    """The header of a checkpoint. Fields that this version does not know are kept.

    Attributes:
        format: Version of this format, `MAJOR.MINOR`; a reader refuses another major version.
        card: Recipe, preprocessing, task, classes and metrics.
        digests: SHA-256 of every stored tensor, by its name in the state dict.
        shared: Alias → name, for tied tensors, which are stored once.
        frozen: Names of the frozen parameters.
        base: For a delta, the checkpoint that holds the other tensors.
        removed: For a delta, names of the base that it does not have.
        whole: For a delta, `digest()` of the complete network.
        versions: Versions of Python, torch and regraft, for information.
        metadata: Data that the caller of `save` added.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str = VERSION
    card: Card = Card()
    digests: dict[str, str] = Field(default_factory=dict)
    shared: dict[str, str] = Field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    base: Base | None = None
    removed: tuple[str, ...] = ()
    whole: str | None = Field(default=None, pattern=DIGEST)
    versions: dict[str, str] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Header":
        if (self.base is None) != (self.whole is None) or (self.removed and self.base is None):
            raise ValueError("base and whole belong together, and removed to them")
        return self

    def digest(self) -> str:
        """Return one SHA-256 over the names and digests of all tensors, independent of their order."""
        return self.whole or digest_of(self.digests)

    def document(self) -> str:
        """Return the header as the JSON document in a file.

        Raises:
            CheckpointError: It is longer than a reader accepts, or holds something that is not JSON data.
        """
        try:
            text = self.model_dump_json()
        except ValueError as error:
            raise CheckpointError(
                f"what the header would hold is no JSON data: {error}. Give metadata and metrics as text, numbers, "
                "lists and dicts. Nothing was written."
            ) from error
        if len(text.encode()) > DOCUMENT_LIMIT_BYTES:
            raise CheckpointError(
                f"what the header would hold takes {len(text):,} bytes, at most {DOCUMENT_LIMIT_BYTES:,} are read. "
                "Leave out some of metadata, metrics or class names. Nothing was written."
            )
        return text


def digest_of(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 over names and digests, independent of their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def current_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    from importlib.metadata import version

    import torch

    names = ("regraft", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, as in 2.10.0+cu128
        **{name: version(name) for name in names},
    }


def locate(path: Path) -> Path:
    """Return the file that describes a checkpoint: `path` itself, the index of its shards, or that of a folder.

    Raises:
        CheckpointError: `path` is a folder with several indexes.
    """
    if path.is_dir():
        indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
        if len(indexes) > 1:
            names = ", ".join(f"'{index.name}'" for index in indexes[:3])
            raise CheckpointError(f"'{path}' holds {len(indexes)} checkpoints ({names}). Give the path of one of them.")
        return indexes[0] if indexes else path / RUN_CHECKPOINT if (path / RUN_CHECKPOINT).is_file() else path
    return index_of(path) if not path.exists() and index_of(path).is_file() else path


def index_of(path: Path) -> Path:
    """Return the path of the index for a checkpoint at `path`.

    >>> index_of(Path("runs/model.safetensors")).name
    'model.safetensors.index.json'
    """
    return path if is_index(path) else path.with_name(path.name.removesuffix(SUFFIX) + INDEX_SUFFIX)


def is_index(path: Path) -> bool:
    """Return whether a path has the name of an index of a checkpoint in several files."""
    return path.name.endswith(INDEX_SUFFIX)


def read_header(path: Path) -> Header | None:
    """Read the header only, without the bytes of any tensor.

    Args:
        path: A checkpoint, the index of one in several files, or a folder with one index.

    Returns:
        The header, or None for a safetensors file that regraft did not write.

    Raises:
        CheckpointError: The file does not exist, is not a safetensors file, or has a malformed header.
    """
    path = locate(path)
    metadata = read_index(path).get("metadata") if is_index(path) else read_start(path)[0].get("__metadata__")
    return header_in(path, metadata[KEY]) if is_own(metadata) else None


def is_own(metadata: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether the metadata of a file or an index are those that regraft writes."""
    return isinstance(metadata, dict) and KEY in metadata


def read_index(path: Path, *, of: str = "a checkpoint") -> dict[str, Any]:
    """Read the JSON object in an index.

    Args:
        path: The index.
        of: What it should be an index of, for the error.

    Raises:
        CheckpointError: The file does not exist, is too long, or is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of a checkpoint.")
    with path.open("rb") as file:
        raw = file.read(HEADER_LIMIT_BYTES + 1)
    try:
        if len(raw) > HEADER_LIMIT_BYTES:
            raise ValueError(f"it has more than {HEADER_LIMIT_BYTES:,} bytes")
        content = parse_json(raw)
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}, expected an object")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is no index of {of}: {type(error).__name__}: {error}. {INDEX_ADVICE}"
        ) from error
    return content


def header_in(path: Path, text: Any) -> Header:
    """Parse the document that regraft wrote into the metadata of `path`.

    Raises:
        CheckpointError: It is malformed, or has another major version.
    """
    try:
        if not isinstance(text, str) or len(text) > DOCUMENT_LIMIT_BYTES:
            raise ValueError(f"expected text of at most {DOCUMENT_LIMIT_BYTES:,} bytes")
        content = parse_json(text)
        version = str(content["format"])[:40]  # checked first, as another major version may have other fields
        if version.partition(".")[0] != VERSION.partition(".")[0]:
            raise CheckpointError(
                f"'{path}' has the format {version}; this version reads {VERSION}. Install a newer regraft."
            )
        return Header.model_validate(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem else f"it is not JSON ({error})"
        raise CheckpointError(
            f"'{path}' has a header that does not fit the format {VERSION}: {reason}. Get or make the file again."
        ) from error


def is_safetensors(path: Path) -> bool:
    """Return whether a file looks like a safetensors file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size


def is_plain_name(name: str) -> bool:
    r"""Return whether a name is that of a file without a folder, on every operating system.

    >>> [is_plain_name(name) for name in ("a.safetensors", "../a", "/a", "a/b", "..", "C:a", "a\\b", "")]
    [True, False, False, False, False, False, False, False]
    """
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")
