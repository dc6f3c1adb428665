"""The cache of features on disk: keys, entries, precision."""
