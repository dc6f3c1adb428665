"""Checkpoints with whatever header and bytes a test wants."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_with(saved: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a copy of a checkpoint with another header document."""
    raw = saved.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + length])
    head["__metadata__"] = change(json.loads(head["__metadata__"]["regraft"]))
    changed = json.dumps(head).encode()
    target.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def document(**fields: Any) -> Callable[[dict[str, Any]], dict[str, str]]:
    return lambda known: {"regraft": json.dumps({**known, **fields})}
