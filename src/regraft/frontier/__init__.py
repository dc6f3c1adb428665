"""Never compute a constant layer twice."""

from regraft.frontier.partitioning import Cut, Partition, partition

__all__ = ["Cut", "Partition", "partition"]
