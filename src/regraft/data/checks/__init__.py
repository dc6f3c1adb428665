"""What photos show of themselves without a network: near-duplicates, and thumbnails to find them by."""
