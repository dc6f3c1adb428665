"""Heads in closed form and the choice of how a head is trained."""
