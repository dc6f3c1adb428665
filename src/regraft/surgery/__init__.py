"""Edit networks: replace, remove, insert and append layers, truncate, stitch, graft, write source."""

from regraft.surgery.codegen.source import to_source
from regraft.surgery.edits import append, insert, truncate
from regraft.surgery.grafting import graft
from regraft.surgery.head import replace_head
from regraft.surgery.stem import replace_stem
from regraft.surgery.stitching import stitch
from regraft.surgery.swap import remove, replace

__all__ = [
    "append",
    "graft",
    "insert",
    "remove",
    "replace",
    "replace_head",
    "replace_stem",
    "stitch",
    "to_source",
    "truncate",
]
