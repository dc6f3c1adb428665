"""What is checked before training begins."""
