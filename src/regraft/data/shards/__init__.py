"""Folders of shards: files that hold many photos each, as tar archives or as tables of parquet and Arrow."""
