"""SIGINT and SIGTERM during training: the first stops the run after the current step, the second at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from regraft.errors import Interrupted

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopRequested(KeyboardInterrupt):
    """A signal requested a stop, and the current step is complete."""


class Signals:
    """Records SIGINT and SIGTERM inside a `with` block; the previous handlers are restored afterwards.

    A signal that the process ignores (as under `nohup`) stays ignored. Outside of the main thread, where Python does
    not allow signal handlers, nothing is recorded.

    Attributes:
        noted: The first signal; None before one arrives.
        is_deferring: Whether the first signal waits for `stop_if_requested`, or interrupts at once.
        agreed: Returns the signal on which all ranks of a run stop after the same step; None: each process for itself.
    """

    def __init__(self) -> None:
        self.noted: signal.Signals | None = None
        self.is_deferring = False
        self.agreed: Callable[[], signal.Signals | None] | None = None
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
        if type(error) is KeyboardInterrupt and self.noted is signal.SIGTERM:
            raise self.interrupted("Nothing was written.") from error

    @property
    def received(self) -> signal.Signals | None:
        """The signal that requests a stop; None without one."""
        return self.noted if self.agreed is None else self.agreed()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer the first signal inside the block until `stop_if_requested`."""
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False

    def stop_if_requested(self) -> None:
        """Raise if a signal was received; called where the run's state is consistent.

        Raises:
            StopRequested: A signal was received.
        """
        if self.received is not None:
            raise StopRequested

    @property
    def name(self) -> str:
        """What stopped the run, as its user calls it."""
        return NAMES[self.received or self.noted or signal.SIGINT]

    def interrupted(self, message: str) -> Interrupted:
        """Return the error for the signal that stopped the run; `message` says what was saved."""
        return Interrupted(f"stopped by {self.name}. {message}", number=self.received or self.noted or signal.SIGINT)

    def _note(self, number: int, _: FrameType | None) -> None:
        # The second signal interrupts even while deferring: a step or a write may hang.
        is_first, self.noted = self.noted is None, self.noted or signal.Signals(number)
        if not (self.is_deferring and is_first):
            raise KeyboardInterrupt
