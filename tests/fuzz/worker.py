"""A process that opens hostile files, one a line on its standard input, and answers with what happened.

It says whether code ran (audit hooks, and a mark that it would leave), how much memory was taken beyond what the
process had, what was raised, and whether what was loaded is what it should be. Run it by hand on one file:

    .venv/bin/python tests/fuzz/worker.py ORIGINALS FILE NAME_OF_ITS_ORIGINAL
"""

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import timm.layers
import torch
import torchvision.ops
import typer.testing
from originals import OWN, network

import regraft
from regraft.checkpoint import read_header
from regraft.cli.app import app

ADDRESS_BYTES = 6 * 2**30  # beyond what the process has: so that a bug cannot take the machine with it
MARK = Path("regraft-fuzz-mark")  # what `marker` leaves, which nothing here may import
ALLOWED = (  # audit events of reading files, importing libraries and computing; any other is noted
    "array.",
    "builtins.id",
    "code.__new__",
    "exec",
    "gc.",
    "glob.",
    "marshal.loads",
    "object.",
    "os.listdir",
    "os.putenv",  # pydantic, as it looks for plugins
    "os.scandir",
    "os.unsetenv",
    "os.walk",
    "pathlib.Path.",
    "sys.",
    "tempfile.",
    "time.",
)


class Witness:
    """Listens to the interpreter while a file is read."""

    def __init__(self) -> None:
        self.listening = False
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.listening or "libnvidia-ml" in f"{arguments!r:.100}":  # torch asks how many GPUs there are
            return
        if event == "open":
            if _writes(arguments):
                self.seen.append(f"opened for writing: {arguments!r:.200}")
        elif event == "import":
            if str(arguments[0]).partition(".")[0] in ("marker", "no_such_module"):
                self.seen.append(f"imported: {arguments[0]}")
        elif event == "compile":
            if "marker" in f"{arguments[0]!r}" and arguments[1] != "<unknown>":  # which is only parsed, by `ast`
                self.seen.append(f"compiled: {arguments!r:.200}")
        elif not event.startswith(ALLOWED):
            self.seen.append(f"{event}: {arguments!r:.200}")


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, mode, flags = (*arguments, None, None, None)[:3]
    harmless = str(path) == os.devnull or str(path).startswith("/proc/")
    wants = any(sign in str(mode) for sign in "wax+") or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
    return bool(wants) and not harmless


def _import_marker() -> ModuleType:
    sys.modules.pop("marker", None)
    import marker

    return marker


PLANTED: dict[str, Callable[[], object]] = {  # proofs that what must not happen would be noticed
    "writes": lambda: Path("planted").write_text(""),
    "imports": _import_marker,
    "leaves a mark": lambda: _import_marker().call(),
    "starts a process": lambda: subprocess.run([sys.executable, "--version"], stdout=subprocess.DEVNULL, check=True),
    "unpickles": lambda: pickle.loads(pickle.dumps(Path("x"))),
    "grows": lambda: bytearray(400 * 2**20),
    "raises": lambda: 1 / 0,
    "hangs": lambda: time.sleep(600),
    "dies": lambda: os._exit(3),
}


class Judge:
    """Opens a file in every way that the public API has, and holds the results against what they should be."""

    def __init__(self, originals: Path) -> None:
        self._originals = originals
        self._models = {name: regraft.load(originals / name) for name in OWN}
        self._target = network()
        self._before = _copies(self._target)
        self.outcomes: dict[str, str] = {}

    def ways(self, path: Path, name: str) -> dict[str, Callable[[], object]]:
        if name.startswith("planted: "):
            return {name: PLANTED[name.removeprefix("planted: ")]}
        like = self._originals / name
        ways: dict[str, Callable[[], object]] = {
            "read_header": lambda: read_header(path),
            "load": lambda: self._load(path, name),
            "load_weights": lambda: self._load_weights(path),
            "diff": lambda: regraft.diff(path, like) and None,
            "diff with itself": lambda: regraft.diff(path, path) and None,
        }
        if (name in OWN and zlib.crc32(path.read_bytes()) % 3 == 0) or path.read_bytes() == like.read_bytes():
            ways["inspect"] = lambda: self._inspect(path)
        return ways

    def saved_as(self, name: str) -> list[str]:
        """Name the originals one of which has to come out where a file that was made of `name` is loaded."""
        return [name] if name in OWN else []

    def _load(self, path: Path, name: str) -> None:
        loaded = regraft.load(path).state_dict()
        expected = [self._models[one].state_dict() for one in self.saved_as(name)]
        assert expected, "a file that regraft did not write was loaded with a recipe"
        expected = [state for state in expected if set(state) == set(loaded)]
        assert expected, "another network than the one that was saved"
        assert any(_all_same(loaded, state) for state in expected), "other weights than those saved"

    def _load_weights(self, path: Path) -> None:
        loaded: tuple[str, ...] = ()
        try:
            loaded = regraft.load_weights(self._target, path).loaded
            assert loaded, "nothing was loaded, and nothing was said"
        finally:
            state = self._target.state_dict()
            changed = [key for key, tensor in self._before.items() if not _same(tensor, state[key])]
            with torch.no_grad():
                for key in changed:
                    state[key].copy_(self._before[key])
            assert set(changed) <= set(loaded), f"changed without being reported: {changed}"

    def _inspect(self, path: Path) -> None:
        result = typer.testing.CliRunner().invoke(app, ["inspect", str(path), "--json"])
        assert result.exit_code in (0, 2), f"exit code {result.exit_code}: {result.exception!r}"
        assert isinstance(result.exception, SystemExit | None), f"{result.exception!r}"
        if result.exit_code == 0:
            json.loads(result.stdout)


def judge(path: Path, name: str, jury: Judge, witness: Witness) -> dict[str, Any]:
    """Open one file in every way, and say what went wrong (an empty list: nothing) and how much it took."""
    wrong: list[str] = []
    outcomes = {}
    peak = 0
    started = time.monotonic()
    for way, run in jury.ways(path, name).items():
        base = _reset_peak()
        witness.seen, witness.listening = [], True
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                run()
            outcomes[way] = "read"
        except regraft.RegraftError as error:
            outcomes[way] = type(error).__name__
            if not str(error).strip() or len(str(error)) > 5000:
                wrong.append(f"{way}: a message of {len(str(error))} characters")
        except BaseException as error:
            wrong.append(f"{way}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            witness.listening = False
        taken = _status("VmHWM") - base
        peak = max(peak, taken)
        if taken > path.stat().st_size + 256 * 2**20:
            wrong.append(f"{way}: took {taken / 2**20:.0f} MiB")
        wrong += [f"{way}: {event}" for event in witness.seen]
    if MARK.exists():
        wrong.append("code of the file ran: it left its mark")
        MARK.unlink()
    return {"wrong": wrong, "outcomes": outcomes, "peak_bytes": peak, "seconds": time.monotonic() - started}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
    )


def _all_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(_same(tensor, expected[key]) for key, tensor in loaded.items())


def _copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def main() -> None:
    originals = Path(sys.argv[1])
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    timm.list_models()
    torchvision.ops.boxes.box_area(torch.zeros(1, 4))
    jury, witness = Judge(originals), Witness()
    for name in sorted(path.name for path in originals.iterdir()):  # what is imported on the way counts for nothing
        judge(originals / name, name, jury, witness)
    limit = _status("VmSize") + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if len(sys.argv) > 2:
        print(json.dumps(judge(Path(sys.argv[2]), sys.argv[3], jury, witness), indent=2))
        return
    answers = os.fdopen(os.dup(1), "w")  # whatever else prints goes to standard error
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        path, name = json.loads(line)
        print(json.dumps(judge(Path(path), name, jury, witness)), file=answers, flush=True)


if __name__ == "__main__":
    main()
