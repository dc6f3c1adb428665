"""The state of a run: saved during training, and loaded to resume."""
