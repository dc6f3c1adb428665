"""The file format: what stands in the header of a checkpoint beside the tensors.

A checkpoint is one safetensors file. Its metadata has one key, `regraft`, with a JSON document of the fields of
`Header`. Any safetensors reader can read the tensors; none of them runs code.
"""

import hashlib
import json
import platform
import struct
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.card import Card
from regraft.errors import CheckpointError

VERSION = "1.0"
KEY = "regraft"
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself


class Header(BaseModel):
    """What a checkpoint says of itself.

    Attributes:
        format: Version of this format, `MAJOR.MINOR`; a reader refuses another major version.
        card: Recipe, preprocessing, task, classes and metrics.
        digests: SHA-256 of every tensor, by its name in the state dict.
        shared: Names of tensors that are stored under another name, because they are the same tensor.
        frozen: Names of the parameters that were frozen.
        versions: Of Python, torch and regraft, for information.
        metadata: Whatever the caller of `save` added.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str = VERSION
    card: Card = Card()
    digests: dict[str, str] = Field(default_factory=dict)
    shared: dict[str, str] = Field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    metadata: dict[str, Any] = Field(default_factory=dict)

    def digest(self) -> str:
        """Return one SHA-256 over the names and digests of all tensors, independent of their order."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def current_versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    from importlib.metadata import version

    names = ("regraft", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, as in 2.10.0+cu128
        **{name: version(name) for name in names},
    }


def read_header(path: Path) -> Header | None:
    """Read the header alone: no tensor, and no more bytes than the header has.

    Returns:
        The header, or None for a safetensors file that regraft did not write.

    Raises:
        CheckpointError: The file does not exist, is no safetensors file, or has a header that cannot be understood.
    """
    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of a checkpoint.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, HEADER_LIMIT_BYTES):
            raise CheckpointError(
                f"'{path}' is no safetensors file, or it is cut off ({size:,} bytes). Expected a file written by "
                "`regraft train` or regraft.save."
            )
        raw = file.read(length)
    try:
        content = json.loads(raw)
        metadata = content.get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(metadata, dict) or KEY not in metadata:
        return None
    return _parse_header(path, metadata[KEY])


def _parse_header(path: Path, text: str) -> Header:
    try:
        version = str(json.loads(text)["format"])  # first: the rest of another major version may mean anything
        if version.partition(".")[0] != VERSION.partition(".")[0]:
            raise CheckpointError(
                f"'{path}' has the format {version}; this version reads {VERSION}. Install a newer regraft."
            )
        return Header.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem else f"it is not JSON ({error})"
        raise CheckpointError(
            f"'{path}' has a header that does not fit the format {VERSION}: {reason}. Get or make the file again."
        ) from error


def is_safetensors(path: Path) -> bool:
    """Say whether a file looks like a safetensors file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size
