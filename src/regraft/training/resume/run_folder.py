"""The folder of a run's results; nothing is written before there are results."""

import contextlib
import csv
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regraft.card import Recipe
from regraft.checkpoint.file.atomic import atomic_write
from regraft.checkpoint.file.format import RUN_CHECKPOINT, RUN_STATES
from regraft.checkpoint.recipes.derivation import derive_recipe
from regraft.checkpoint.write import without_wrapper, write_model
from regraft.errors import ConfigError, RunError
from regraft.training.config import TrainConfig, write_config
from regraft.training.result import EpochRecord
from regraft.wording import for_caller, option

METRICS, CONFIG, REPORT, LOCK = "metrics.csv", "config.toml", "report.html", "run.lock"
SAFETENSORS_TEMPORARY = ".tmp??????"  # pattern of the temporary files that the safetensors writer makes


class RunFolder:
    """Writes a run's checkpoint, configuration and metrics.

    Args:
        path: The folder.
        overwrite: Whether existing results may be replaced; they stay until the first new ones exist.
        continues: Whether the existing results belong to the run that is resumed.

    Raises:
        ConfigError: The folder exists and is not empty, another run is using it, or it cannot be created.
    """

    def __init__(self, path: Path, *, overwrite: bool, continues: bool = False) -> None:
        self.path = path
        self.has_stale_results = overwrite and not continues
        self._recipe: Recipe | None = None
        try:
            for parent in (path, *path.parents):
                if parent.exists() and not parent.is_dir():
                    raise ConfigError(
                        f"'{parent}' is a file, expected a folder for the results ({option('out', 'FOLDER')})."
                    )
            names = {child.name for child in path.iterdir()} if path.is_dir() else set()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{path}' cannot be a folder for the results: {error}. Choose another: {option('out', 'FOLDER')}."
            ) from error
        if LOCK in names:  # fails here, before any data is read, if another run holds it
            self._acquire_lock().release()
        if names - {LOCK} and not overwrite and not continues:
            resume = for_caller(python="resume=True", command=f"regraft train --resume {shlex.quote(str(path))}")
            hint = f", or go on with what stopped there: {resume}" if RUN_STATES in names else ""
            raise ConfigError(
                f"'{path}' exists and is not empty. Choose another ({option('out', 'FOLDER')}), or pass "
                f"{option('overwrite', True)}{hint}."
            )

    @property
    def checkpoint(self) -> Path:
        """Path of the saved model."""
        return self.path / RUN_CHECKPOINT

    @property
    def states(self) -> Path:
        """Folder of the run's states."""
        return self.path / RUN_STATES

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for the block; folders that it created and that are still empty are removed afterwards.

        Raises:
            ConfigError: Another run is using the folder.
            RunError: The folder cannot be created.
        """
        created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._acquire_lock()
        try:
            with contextlib.suppress(OSError):  # the process id only serves the error message of another run
                (self.path / LOCK).write_text(str(os.getpid()), encoding="ascii")
            self._delete_partial_files()
            yield
        finally:
            # Before the release, so that no other run locks a file that is about to be deleted.
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            lock.release()
            with contextlib.suppress(OSError):
                for folder in created:
                    folder.rmdir()

    def prepare_recipe(self, model: nn.Module) -> str | None:
        """Derive the recipe with which `model` will be saved; training does not change it.

        Returns:
            Where there is none: a warning that says why, and how to load the file.
        """
        derivation = derive_recipe(without_wrapper(model))
        self._recipe = derivation.recipe
        return derivation.warning(self.checkpoint) if derivation.reason is not None else None

    def save_model(self, model: nn.Module, config: TrainConfig) -> None:
        """Save the best model so far, with the configuration."""
        write_model(model, self.checkpoint, self._recipe)
        with self._writing():
            (self.path / REPORT).unlink(missing_ok=True)  # of another model, or of this run when it was stopped before
            if self.has_stale_results:  # they belong to the model that was just replaced
                (self.path / METRICS).unlink(missing_ok=True)
                self.has_stale_results = False
            write_config(config, self.path / CONFIG)

    def save_history(self, history: Sequence[EpochRecord]) -> None:
        """Write the metrics of all epochs so far as CSV."""
        rows = [record.to_row() for record in history]
        with (
            self._writing(),
            atomic_write(self.path / METRICS, flush=False) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _delete_partial_files(self) -> None:
        """Delete temporary files of a process that was killed while writing."""
        with contextlib.suppress(OSError):
            for pattern in (
                *(f".{name}.*.tmp" for name in (RUN_CHECKPOINT, METRICS, CONFIG, REPORT)),
                SAFETENSORS_TEMPORARY,
            ):
                for file in self.path.glob(pattern):
                    file.unlink()

    def _acquire_lock(self) -> Any:
        """Acquire the lock; the operating system releases it when the process dies."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            holder = ""
            with contextlib.suppress(OSError):
                holder = (self.path / LOCK).read_text(encoding="ascii", errors="replace").strip()
            raise ConfigError(
                f"another run is writing into '{self.path}': process {holder or 'unknown'}. Choose another "
                f"({option('out', 'FOLDER')}), or wait until it has ended."
            ) from error
        return lock

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write into '{self.path}': {error}. Free some space, or choose another folder "
                f"({option('out', 'FOLDER')})."
            ) from error
