"""Split a network into a constant part, computed once, and a live part."""

from regraft.frontier.partitioning import Cut, Partition, partition

__all__ = ["Cut", "Partition", "partition"]
