"""Doubt: how sure a trained network may be, and which photos resemble none that it was trained on."""
