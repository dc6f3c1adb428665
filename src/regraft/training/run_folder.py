"""The folder of a run's results; nothing is written into it before there is something worth keeping."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from regraft.checkpoint.write import save
from regraft.errors import ConfigError, RunError
from regraft.training.config import TrainConfig, write_config
from regraft.training.result import EpochRecord

CHECKPOINT, METRICS, CONFIG, REPORT = "model.safetensors", "metrics.csv", "config.toml", "report.html"


class RunFolder:
    """Writes a run's checkpoint, configuration and metrics.

    Args:
        path: The folder.
        overwrite: Whether results that are there already may be replaced; they stay until the first new ones exist.

    Raises:
        ConfigError: The folder exists and is not empty, or cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"'{path}' is a file, expected a folder for the results (--out).")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise ConfigError(f"'{path}' exists and is not empty. Choose another --out, or pass --overwrite.")

    @property
    def checkpoint(self) -> Path:
        """Where the model is saved."""
        return self.path / CHECKPOINT

    def keep_model(self, model: nn.Module, config: TrainConfig) -> None:
        """Save the best model so far, and how it came about."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder '{self.path}': {error}. Choose another --out.") from error
        if not (self.path / METRICS).exists() or not self.checkpoint.exists():
            (self.path / REPORT).unlink(missing_ok=True)
        save(model, self.checkpoint)
        write_config(config, self.path / CONFIG)

    def keep_history(self, history: Sequence[EpochRecord]) -> None:
        """Write the figures of all epochs so far as a table."""
        rows = [record.to_row() for record in history]
        with (self.path / METRICS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
