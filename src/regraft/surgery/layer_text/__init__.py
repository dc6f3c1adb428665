"""Layers as text: parsing, reading back, and building them."""
