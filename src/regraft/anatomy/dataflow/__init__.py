"""A network's forward as a graph, traced and computed on shapes."""
