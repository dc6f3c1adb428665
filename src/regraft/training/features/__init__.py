"""Features that are computed once: extraction, caching, and batches."""
