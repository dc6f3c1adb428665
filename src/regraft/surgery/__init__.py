"""Change a network's graph."""

from regraft.surgery.head import find_heads, replace_head

__all__ = ["find_heads", "replace_head"]
