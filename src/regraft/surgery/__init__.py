"""Change a network's graph."""

from regraft.surgery.head import replace_head

__all__ = ["replace_head"]
