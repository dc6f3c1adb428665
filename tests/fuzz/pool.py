"""Worker processes that open files, their time limits, and what is kept of a file that fails."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
START_S = 240  # importing everything, on a machine that does other things as well
CASE_S = 120  # in which a million instructions are followed several times over, on such a machine


@dataclass
class Worker:
    """A process that opens one file at a time; a new one takes its place when it dies or does not answer."""

    originals: Path
    folder: Path
    process: Any = field(default=None, init=False)

    def judged(self, content: bytes, original: str, *, limit_s: float = CASE_S) -> dict[str, Any]:
        """Let a file be opened in every way, and return what the worker says of it."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        case = self.folder / f"case{Path(original).suffix}"
        case.write_bytes(content)
        try:
            self.process.stdin.write(json.dumps([str(case), original]) + "\n")
            self.process.stdin.flush()
            answer = self._line(limit_s)
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        reason = f"no answer within {limit_s:g} s" if answer is None else f"the process died ({self.process.wait(10)})"
        self.close()
        return {"wrong": [reason], "outcomes": {}, "peak_bytes": 0, "seconds": limit_s}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        self.close()
        self.folder.mkdir(exist_ok=True, parents=True)
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(self.originals)],
            cwd=self.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        assert self._line(START_S) == "ready\n"

    def _line(self, limit_s: float) -> str | None:
        """Return a line, an empty text where the process is gone, None where nothing came in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        return self.process.stdout.readline() if ready else None


def kept(folder: Path, originals: Path, label: str, original: str, content: bytes, wrong: list[str]) -> str:
    """Keep a file that fails, and say how to open it again."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.case")))
    path = folder / f"{number}{Path(original).suffix}.case"
    path.write_bytes(content)
    reasons = "\n  ".join(wrong)
    path.with_suffix(".txt").write_text(f"{label} of {original}:\n{reasons}\n")
    return f"{label} of {original}:\n  {reasons}\nagain: {sys.executable} {WORKER} {originals} {path} {original}"
