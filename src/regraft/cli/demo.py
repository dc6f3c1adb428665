"""`regraft demo`."""


def demo() -> None:
    """Demo."""
