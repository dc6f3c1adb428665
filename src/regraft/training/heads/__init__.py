"""Heads: initial weights in closed form, and cross-validation of their training options."""
