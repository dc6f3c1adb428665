"""The checkpoint file: format, layout, digests, shards, atomic writing."""
