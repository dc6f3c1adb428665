"""The folder of a run's results; nothing is written into it before there is something worth keeping."""

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regraft.checkpoint.file.atomic import atomic_write
from regraft.checkpoint.write import save
from regraft.errors import ConfigError, RunError
from regraft.training.config import TrainConfig, write_config
from regraft.training.result import EpochRecord

CHECKPOINT, METRICS, CONFIG, REPORT = "model.safetensors", "metrics.csv", "config.toml", "report.html"
STATES, LOCK = "last", "run.lock"
OF_SAFETENSORS = ".tmp??????"  # what its writer calls a file before it has its name


class RunFolder:
    """Writes a run's checkpoint, configuration and metrics.

    Args:
        path: The folder.
        overwrite: Whether results that are there already may be replaced; they stay until the first new ones exist.
        continues: Whether they are those of the run that goes on here.

    Raises:
        ConfigError: The folder exists and is not empty, another run is using it, or it cannot be made.
    """

    def __init__(self, path: Path, *, overwrite: bool, continues: bool = False) -> None:
        self.path = path
        self.has_stale_results = overwrite and not continues
        try:
            for parent in (path, *path.parents):
                if parent.exists() and not parent.is_dir():
                    raise ConfigError(f"'{parent}' is a file, expected a folder for the results (--out).")
            names = {child.name for child in path.iterdir()} if path.is_dir() else set()
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{path}' cannot be a folder for the results: {error}. Choose another --out.") from error
        if LOCK in names:
            self._acquired().release()
        if names - {LOCK} and not overwrite and not continues:
            onward = f", or go on with what stopped there: regraft train --resume {path}" if STATES in names else ""
            raise ConfigError(f"'{path}' exists and is not empty. Choose another --out, or pass --overwrite{onward}.")

    @property
    def checkpoint(self) -> Path:
        """Where the model is saved."""
        return self.path / CHECKPOINT

    @property
    def states(self) -> Path:
        """Where the states of the run are."""
        return self.path / STATES

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder; what is still empty on leaving, and was not there before, goes again.

        Raises:
            ConfigError: Another run is using it.
            RunError: It cannot be made.
        """
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._acquired()
        try:
            with contextlib.suppress(OSError):  # who holds it is a courtesy
                (self.path / LOCK).write_text(str(os.getpid()), encoding="ascii")
            self._clear_what_was_cut_off()
            yield
        finally:
            with contextlib.suppress(OSError):  # while it is held, so that nobody takes what is about to go
                (self.path / LOCK).unlink()
            lock.release()
            with contextlib.suppress(OSError):
                for folder in created:
                    folder.rmdir()

    def keep_model(self, model: nn.Module, config: TrainConfig) -> None:
        """Save the best model so far, and how it came about."""
        save(model, self.checkpoint)
        with self._writing():
            if self.has_stale_results:  # what belongs to the model that was just replaced
                (self.path / REPORT).unlink(missing_ok=True)
                (self.path / METRICS).unlink(missing_ok=True)
                self.has_stale_results = False
            write_config(config, self.path / CONFIG)

    def keep_history(self, history: Sequence[EpochRecord]) -> None:
        """Write the figures of all epochs so far as a table."""
        rows = [record.to_row() for record in history]
        with (
            self._writing(),
            atomic_write(self.path / METRICS, flush=False) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _clear_what_was_cut_off(self) -> None:
        """Delete what a process was writing when it was killed."""
        with contextlib.suppress(OSError):
            for pattern in (*(f".{name}.*.tmp" for name in (CHECKPOINT, METRICS, CONFIG)), OF_SAFETENSORS):
                for file in self.path.glob(pattern):
                    file.unlink()

    def _acquired(self) -> Any:
        """Take the lock, which the system gives back when a process dies."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            holder = ""
            with contextlib.suppress(OSError):
                holder = (self.path / LOCK).read_text(encoding="ascii", errors="replace").strip()
            raise ConfigError(
                f"another run is writing into '{self.path}': process {holder or 'unknown'}. Choose another --out, or "
                "wait until it has ended."
            ) from error
        return lock

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write into '{self.path}': {error}. Free some space, or choose another --out."
            ) from error
