"""The folder of a run's results; nothing is written into it before there is something worth keeping."""

import contextlib
import csv
from collections.abc import Iterator, Sequence
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
        self._has_stale_results = overwrite
        try:
            for taken in (path, *path.parents):
                if taken.exists() and not taken.is_dir():
                    raise ConfigError(f"'{taken}' is a file, expected a folder for the results (--out).")
            is_used = path.is_dir() and any(path.iterdir())
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{path}' cannot be a folder for the results: {error}. Choose another --out.") from error
        if is_used and not overwrite:
            raise ConfigError(f"'{path}' exists and is not empty. Choose another --out, or pass --overwrite.")

    @property
    def checkpoint(self) -> Path:
        """Where the model is saved."""
        return self.path / CHECKPOINT

    def keep_model(self, model: nn.Module, config: TrainConfig) -> None:
        """Save the best model so far, and how it came about."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        save(model, self.checkpoint)
        with self._writing():
            if self._has_stale_results:  # what belongs to the model that was just replaced
                (self.path / REPORT).unlink(missing_ok=True)
                (self.path / METRICS).unlink(missing_ok=True)
                self._has_stale_results = False
            write_config(config, self.path / CONFIG)

    def keep_history(self, history: Sequence[EpochRecord]) -> None:
        """Write the figures of all epochs so far as a table."""
        rows = [record.to_row() for record in history]
        with self._writing(), (self.path / METRICS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write into '{self.path}': {error}. Free some space, or choose another --out."
            ) from error
