"""Features on disk: keys, entries, precision."""
