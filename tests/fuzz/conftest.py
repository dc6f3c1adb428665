"""What pytest does not look into."""

collect_ignore = [
    "guided.py",  # is run by `test_guided.py`, where atheris is installed
    "marker.py",  # leaves its mark where it is imported, as the doctests would
]
