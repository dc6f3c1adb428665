"""What is computed once: features, how they are kept, and the batches made of them."""
