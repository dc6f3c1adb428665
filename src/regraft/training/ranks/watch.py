"""Heartbeats: which of the ranks have ended, when what is exchanged with them fails, or never comes.

Every rank counts up a number of its own in the launcher's key-value store, in a thread. A collective that fails says
that a connection was closed, but not whose; the rank whose number stands still is the one. Ranks that end by an error
or on a signal leave a note, so that a rank which stops a moment earlier is not taken for dead.

A collective on a GPU cannot be interrupted: where a rank has ended and this one does not get on, the thread ends the
process, and what it last saved stays.
"""

import contextlib
import os
import threading
import time
from datetime import timedelta
from typing import Any

BEAT_S = 0.5
SILENT_S = 3.0  # without a beat until a rank counts as ended, once something has failed
LOST_S = 12.0  # and while nothing has
GRACE_S = 12.0  # from then on, for this process to end by itself
STOPPED, FAILED = "stopped", "failed: "  # notes that ranks leave; text follows the second


class Watch:
    """Beats for this rank until the process ends, and tells which other ranks have ended.

    Args:
        store: The launcher's store, by a connection that nothing else uses.
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock, self._answered_at = threading.Lock(), time.monotonic()
        self._beats: dict[int, tuple[int, float]] = dict.fromkeys(range(size), (0, time.monotonic()))
        self._is_left = False
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def leave(self, reason: str) -> None:
        """Note why this rank ends, for the others."""
        self._is_left = True
        with self._lock, contextlib.suppress(RuntimeError):
            self._store.set(f"regraft/left/{self._rank}", reason)

    def join_again(self) -> None:
        """Take the note back: this rank goes on with another run."""
        if self._is_left:
            self._is_left = False
            with self._lock, contextlib.suppress(RuntimeError):
                self._store.delete_key(f"regraft/left/{self._rank}")

    def finish(self) -> None:
        """Note that this process has come to its end, unless it left another reason."""
        if not self._is_left:
            self.leave("has come to its end")

    def ended(self) -> dict[int, str]:
        """Return the other ranks that have ended, with the reasons; those that stopped on a signal are left out.

        Takes `SILENT_S` where none has left a note.
        """
        began = time.monotonic()
        while True:
            if time.monotonic() - self._answered_at > SILENT_S:  # nothing can be known of the others
                return {} if self._rank == 0 else {0: "was killed, or the launcher has ended: its store is gone"}
            notes = self._notes()
            silent = [rank for rank in range(self._size) if rank not in notes and self._silent_s(rank) >= SILENT_S]
            failed = {rank: reason for rank, reason in notes.items() if reason != STOPPED}
            if failed or silent or time.monotonic() - began > 2 * SILENT_S:
                return {**dict.fromkeys(silent, "was killed, or its machine is gone"), **failed}
            if len(notes) == self._size - 1:
                return {}
            time.sleep(BEAT_S)

    def note_of(self, rank: int, wait_s: float) -> str | None:
        """Return the note of a rank, once it has left one; None where it leaves none in time."""
        deadline = time.monotonic() + wait_s
        while rank not in (notes := self._notes()) and time.monotonic() < deadline:
            time.sleep(BEAT_S / 5)
        return notes.get(rank)

    def _notes(self) -> dict[int, str]:
        notes = {}
        with self._lock:
            for rank in set(range(self._size)) - {self._rank}:
                with contextlib.suppress(RuntimeError):
                    if self._store.check([f"regraft/left/{rank}"]):
                        notes[rank] = self._store.get(f"regraft/left/{rank}").decode()
        return notes

    def _silent_s(self, rank: int) -> float:
        return 0.0 if rank == self._rank else time.monotonic() - self._beats[rank][1]

    def _run(self) -> None:
        lost_at = None
        while True:
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it the launcher
                self._beat()
            silent = {rank for rank in range(self._size) if self._silent_s(rank) > LOST_S}
            is_lost = bool(silent - set(self._notes())) if silent and not self._is_left else False
            lost_at = (lost_at or time.monotonic()) if is_lost else None
            if lost_at is not None and time.monotonic() - lost_at > GRACE_S:
                os.abort()  # no Python runs in a main thread that waits for a GPU
            time.sleep(BEAT_S)

    def _beat(self) -> None:
        with self._lock:
            self._store.add(f"regraft/beat/{self._rank}", 1)
            self._answered_at = time.monotonic()
            for rank, (known, _) in self._beats.items():
                if (count := self._store.add(f"regraft/beat/{rank}", 0)) != known:
                    self._beats[rank] = count, time.monotonic()


def connect() -> Any:
    """Return a connection of its own to the launcher's store; None where there is no such store."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # not in every build of torch

    with contextlib.suppress(RuntimeError, KeyError, ValueError):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
    return None
