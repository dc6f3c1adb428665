"""Checks before training begins."""
