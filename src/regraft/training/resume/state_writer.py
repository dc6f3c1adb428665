"""The states of a run on disk: when they are written, which are kept, and which is the newest intact one."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from regraft.checkpoint.file.tree import Tree, read_tree, write_tree
from regraft.errors import CheckpointError, ConfigError, LossError, RunError
from regraft.progress import SILENT, Progress
from regraft.wording import option

PATTERN = "state-*.safetensors"
MIN_SECONDS = 1.0  # between states at the ends of epochs
SHARE = 20  # training time between two states, in units of the time that writing one takes: 5 % overhead


class StateWriter:
    """Writes states in the background, one at a time.

    As a context manager, it deletes the states when the block ends without an error, and after a `LossError`: a resumed
    run would only fail again. After another error the states stay if the run has made progress, and after an
    interruption they always stay.

    Args:
        folder: Folder of the states; None writes nothing.
        keep_last: Number of states to keep.
        every_s: Seconds between states within an epoch; 0 writes one after every step.
        progress: Reports a state that cannot be written.
        resumed_from: The state from which the run resumes; None for a new run, which deletes states of older runs.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        keep_last: int,
        every_s: float,
        progress: Progress = SILENT,
        resumed_from: Path | None = None,
    ) -> None:
        self._folder, self._keep_last, self._every_s, self._progress = folder, keep_last, every_s, progress
        self._kept = [resumed_from] if resumed_from is not None else []  # paths of complete states, oldest first
        self._pool = ThreadPoolExecutor(1, "states")  # one thread: states are written one after the other
        self._writing: Future[float] | None = None
        self._last, self._cost_s = time.monotonic(), 0.0
        self._problem = ""
        self.has_progress = resumed_from is not None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.wait()
        self._pool.shutdown()
        is_failure = isinstance(error, Exception) and not self.has_progress
        if kind is None or isinstance(error, LossError) or is_failure:
            self._delete(keep=[])

    @property
    def has_any(self) -> bool:
        """Whether there is a state to resume from."""
        return bool(self._kept)

    def is_due_within_epoch(self) -> bool:
        """Return whether a state is due after a step."""
        if self._folder is None:
            return False
        return self._every_s == 0 or (self._elapsed() >= self._every_s and not self._is_busy())

    def is_due_after_epoch(self) -> bool:
        """Return whether a state is due after an epoch: always, unless it would slow training down."""
        if self._folder is None:
            return False
        is_late = self._elapsed() >= max(MIN_SECONDS, SHARE * self._cost_s) and not self._is_busy()
        return is_late or self.is_due_within_epoch()

    def keep(self, take: Callable[[], Tree], epoch: int, step: int) -> None:
        """Take a state now, and write it in the background; waits until the previous one is written.

        Args:
            take: Returns the state. It is written later, so training must not change its tensors.
            epoch: The current epoch, from 1.
            step: Number of completed steps in it.
        """
        if self._folder is None:
            return
        self.wait()
        began = time.monotonic()
        tree = take()
        taken_s = time.monotonic() - began
        path = self._folder / f"state-{epoch:06d}-{step:09d}.safetensors"
        self._writing = self._pool.submit(self._write, tree, path, taken_s)
        self._last = time.monotonic()
        self.has_progress |= (epoch, step) > (1, 0)

    def wait(self) -> str:
        """Wait for the state that is being written; return why the last one failed, or an empty string."""
        writing, self._writing = self._writing, None
        if writing is None:
            return self._problem
        try:
            self._cost_s = writing.result()
        except (RunError, TypeError, OSError) as error:
            before, self._problem = self._problem, str(error)
            if before != self._problem:  # report a full disk only once
                self._progress.say(f"state      not written: {error} Training goes on")
        else:
            self._problem = ""
        return self._problem

    def _elapsed(self) -> float:
        return time.monotonic() - self._last

    def _is_busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def _write(self, tree: Tree, path: Path, taken_s: float) -> float:
        began = time.monotonic()
        if not self._kept:  # a new run: states of an older one must not be resumed
            self._delete(keep=[])
        path.parent.mkdir(exist_ok=True)
        write_tree(tree, path)
        # Older states are deleted only now, so that an intact one exists at any time.
        self._kept = [*(old for old in self._kept if old != path), path][-self._keep_last :]
        self._delete(keep=self._kept)
        return taken_s + time.monotonic() - began

    def _delete(self, keep: list[Path]) -> None:
        """Delete all other files in the folder, and the folder itself where nothing is kept."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            for file in set(self._folder.iterdir()).difference(keep):
                with contextlib.suppress(OSError):  # Windows deletes no file that is in use; the next state tries again
                    file.unlink()
            if not keep:
                self._folder.rmdir()


def find_state(folder: Path, progress: Progress) -> tuple[Path, Tree] | None:
    """Read the newest intact state in a folder; a damaged one is skipped and reported.

    Raises:
        ConfigError: There are states, but none of them can be read.
    """
    files = sorted(folder.glob(PATTERN), reverse=True)
    for file in files:
        try:
            return file, read_tree(file)
        except CheckpointError as error:
            progress.say(f"state      passed over: {error}")
    if files:
        raise ConfigError(
            f"none of the {len(files)} states in '{folder}' can be read. Start again with {option('overwrite', True)}."
        )
    return None
