"""How the architecture of a network comes about: read off the network, proved, and built again."""
