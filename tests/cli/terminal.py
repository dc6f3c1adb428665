"""A terminal for tests: command lines run in it at several widths, and its screen can be read."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

PARTS = re.compile(r"\x1b\[(\?25[lh]|[\d;]*[A-Za-z])|\r|\n|[^\x1b\r\n]")
MARK = "\x1e"  # before the output of each command
DRIVER = """
import fcntl, json, struct, sys, termios
from regraft.cli.app import app
for columns, words in json.loads(sys.argv[1]):
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    print("\\x1e", end="", flush=True)
    try:
        app(words)
    except SystemExit as end:
        if end.code:
            print("exit code", end.code, flush=True)
"""


class Screen:
    """Shows text as a terminal does: it goes on in the next line where one is full, in the middle of a word too."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def show(self, text: str) -> None:
        for part in PARTS.finditer(text):
            code, sign = part[1], part[0]
            if code is None and sign == "\r":
                self.column = 0
            elif code is None and sign == "\n":
                self._move_down()
            elif code is None:
                if self.column == self.columns:
                    self._move_down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + sign + line[self.column + 1 :]
                self.column += 1
            elif code.endswith("A"):
                self.row = max(0, self.row - int(code[:-1] or 1))
            elif code == "2K":
                self.lines[self.row] = ""
            else:
                assert code.endswith(("m", "?25l", "?25h")), f"{code!r} is not known to this terminal"

    def _move_down(self) -> None:
        self.row += 1
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


def run_on_terminal(commands: list[tuple[int, list[str]]], folder: Path) -> list[str]:
    """Run command lines of regraft in one process, each with so many columns; return the screen after each."""
    import pty

    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env={**environment, "TERM": "xterm-256color", "REGRAFT_CACHE": str(folder / "cache")},
    )
    os.close(theirs)
    sent = b""
    with contextlib.suppress(OSError):  # on Linux, reading fails when the other side is closed
        while data := os.read(ours, 65536):
            sent += data
    os.close(ours)
    process.wait(60)
    outputs = sent.decode().split(MARK)[1:]
    assert len(outputs) == len(commands), sent.decode()
    screens = [Screen(columns) for columns, _ in commands]
    for screen, output in zip(screens, outputs, strict=True):
        screen.show(output)
    return [screen.text() for screen in screens]
