"""Never compute a constant layer twice."""

from regraft.frontier.partition import Cut, Partition, partition

__all__ = ["Cut", "Partition", "partition"]
