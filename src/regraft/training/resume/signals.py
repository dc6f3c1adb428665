"""SIGINT and SIGTERM while a run trains: the first asks it to stop after its step, the second stops it at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from regraft.errors import Interrupted

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopAsked(KeyboardInterrupt):
    """Somebody asked the run to stop, and its step is done."""


class Signals:
    """Notes SIGINT and SIGTERM inside a `with` block; what handled them before does so again afterwards.

    A signal that the process ignores (as under `nohup`) stays ignored, and outside of the main thread, where Python
    does not allow to handle signals, nothing is noted.

    Attributes:
        received: The first that came; None: none did.
        is_patient: Whether the first one waits to be asked for (see `stop_if_asked`), or interrupts at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if type(error) is KeyboardInterrupt and self.received is signal.SIGTERM:
            raise self.interrupted("Nothing was written.") from error

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Let the first signal wait inside the block until it is asked for."""
        self.is_patient = True
        try:
            yield
        finally:
            self.is_patient = False

    def stop_if_asked(self) -> None:
        """Stop here, where somebody asked for it.

        Raises:
            StopAsked: Somebody did.
        """
        if self.received is not None:
            raise StopAsked

    def interrupted(self, message: str) -> Interrupted:
        """Return the error that says so: `message` follows on what stopped the run."""
        number = self.received or signal.SIGINT
        return Interrupted(f"stopped by {NAMES[number]}. {message}", number=number)

    def _note(self, number: int, _: FrameType | None) -> None:
        is_first, self.received = self.received is None, self.received or signal.Signals(number)
        if not (self.is_patient and is_first):
            raise KeyboardInterrupt
