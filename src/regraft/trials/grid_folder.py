"""The folder of a comparison: one file per cell, so that a grid that was stopped repeats nothing."""

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.checkpoint.file.atomic import atomic_write
from regraft.errors import ConfigError, RunError
from regraft.trials.cells import Cell, CellResult
from regraft.trials.ways import Options
from regraft.wording import option

GRID, CELLS, LOCK = "grid.json", "cells", "grid.lock"


class GridFolder:
    """Reads and writes the results of the cells.

    Args:
        path: The folder; None keeps nothing.
        fingerprint: What the results depend on besides their cell, as JSON data.
        overwrite: Whether the results of another comparison may be deleted.

    Raises:
        ConfigError: The folder holds something else.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self._fingerprint, self._overwrite = path, json.loads(json.dumps(fingerprint)), overwrite
        if path is None:
            return
        where = option("out", "FOLDER")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"'{path}' is a file, expected a folder for the results ({where}).")
        if overwrite or not path.exists() or not any(path.iterdir()):
            return
        known = self._read(path / GRID)
        if not isinstance(known, dict):
            raise ConfigError(f"'{path}' exists and holds no comparison. Choose another folder ({where}).")
        if known != self._fingerprint:
            old, new = _flat(known), _flat(self._fingerprint)
            name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
            details = f"'{name}' was {_short(old.get(name))} and is {_short(new.get(name))}"
            raise ConfigError(
                f"'{path}' holds the results of another comparison: {details}. Choose another folder ({where}), or "
                f"pass {option('overwrite', True)}, which deletes them."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for the block, so that no second process computes the same cells.

        Raises:
            ConfigError: Another process has it.
            RunError: It cannot be written.
        """
        if self.path is None:
            yield
            return
        from filelock import FileLock, Timeout

        with self._writing():
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another process compares into '{self.path}'. Wait until it has ended, or choose another folder "
                f"({option('out', 'FOLDER')})."
            ) from error
        try:
            with self._writing():
                if self._overwrite:
                    for file in (self.path / CELLS).glob("*.json"):
                        file.unlink()
                self.write(GRID, json.dumps(self._fingerprint, indent=1))
            yield
        finally:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            lock.release()

    def find(self, cell: Cell, stages: Sequence[Options]) -> CellResult | None:
        """Return the result of a cell from an earlier run; None without one, or where it was run with other options."""
        if self.path is None:
            return None
        values = self._read(self.path / CELLS / f"{cell.name}.json")
        try:
            if values["planned"] != json.loads(json.dumps(list(stages))):
                return None
            return CellResult.from_dict(values["result"])
        except (TypeError, KeyError, ValueError):
            return None

    def keep(self, result: CellResult, stages: Sequence[Options]) -> None:
        """Write the result of a cell, as a whole or not at all.

        Raises:
            RunError: The disk is full, or cannot be written.
        """
        if self.path is not None:
            self.write(
                f"{CELLS}/{result.cell.name}.json", json.dumps({"planned": list(stages), "result": result.to_dict()})
            )

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder.

        Raises:
            RunError: The disk is full, or cannot be written.
        """
        assert self.path is not None
        with self._writing(), atomic_write(self.path / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
        return self.path / name

    def resume_hint(self, done: int, total: int) -> str:
        """Return what is said when the grid was stopped."""
        if self.path is None:
            return f"{done} of {total} runs were complete. With {option('out', 'FOLDER')} they would have been kept."
        return (
            f"{done} of {total} runs are complete, and kept in {shlex.quote(str(self.path))}. The same call goes on "
            "from there."
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write into '{self.path}': {error}. Free some space, or choose another folder "
                f"({option('out', 'FOLDER')}); the results before are kept."
            ) from error

    @staticmethod
    def _read(file: Path) -> Any:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    options = fingerprint.get("options")
    return {**fingerprint, **(options if isinstance(options, dict) else {}), "options": None}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
