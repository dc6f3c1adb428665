"""What a process costs before and beside the training: seconds of whole processes, and what they import.

    python benchmarks/start.py              # minutes on two cores
    python benchmarks/start.py --repeats 3

The commands take turns, so that a noisy machine is as noisy for each; the seconds are medians. `processor` is the time
on all cores, which another program on the machine changes less than the seconds on the clock. The last column comes
from one more run of each, with `python -X importtime`: the number of modules, and which large ones are among them.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"
LARGE = (
    *("torch", "torch._dynamo", "sympy", "triton", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "jinja2"),
    *("pydantic", "rich", "PIL"),
)


def commands(data: Path, weights: Path, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of `python` for each row of the table; the first of them trains what the others read."""
    regraft = ["-m", "regraft"]
    network = f"py:{ROOT / 'examples/mobilenet_v1.py'}:MobileNetV1"
    options = ["--model", network, "--weights", str(weights), "--trust-code", "--augment", "none", "--overwrite"]
    checkpoint = str(folder / "run" / "model.safetensors")
    photo = next(str(path) for path in sorted(data.rglob("*.jpg")))
    one_view = ["--views", "1", "--augment", "none", "--data", str(data), "--weights", str(weights)]
    return {
        "regraft train, with a report": [*regraft, "train", str(data), *options, "--out", str(folder / "run")],
        "the same by fit, without one": [str(HERE / "contenders" / "regraft_fit.py"), *one_view],
        "regraft evaluate": [*regraft, "evaluate", checkpoint, str(data), "--trust-code"],
        "regraft predict, one photo": [*regraft, "predict", checkpoint, photo, "--trust-code"],
        "regraft inspect": [*regraft, "inspect", checkpoint, "--trust-code"],
        "regraft --help": [*regraft, "--help"],
        "import regraft; regraft.fit": ["-c", "import regraft; regraft.fit"],
        "import torch": ["-c", "import torch"],
    }


def main() -> None:
    """Run everything in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data/hymenoptera")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights/mobilenetV1X0.25_pretrain.tar")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"{machine.describe()}; median of {options.repeats}, which take turns\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = commands(options.data, options.weights, folder)
        modules = {row: imported(arguments, folder) for row, arguments in rows.items()}  # compiles all bytecode, too
        seconds: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
        for _ in range(options.repeats):
            for row, arguments in rows.items():
                seconds[row].append(timed(arguments, folder))
    unit = statistics.median(processor for _, processor in seconds["import torch"])
    print("| process | seconds | processor | in `import torch` | modules |\n|---|---|---|---|---|")
    for row, pairs in seconds.items():
        clock, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        large = ", ".join(name for name in LARGE if name in modules[row])
        print(f"| {row} | {clock:.2f} | {processor:.2f} | {processor / unit:.2f} | {len(modules[row])}: {large} |")


def timed(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Run Python once, and return its seconds on the clock and on all cores."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(arguments, folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, processor


def imported(arguments: list[str], folder: Path) -> set[str]:
    """Run Python once, and return the names of the modules that it imports."""
    lines = run(["-X", "importtime", *arguments], folder).splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def run(arguments: list[str], folder: Path) -> str:
    """Run Python once with an empty cache of features, and return what it writes to standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment["REGRAFT_CACHE"] = cache
        finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed:\n{finished.stderr[-3000:]}")
    return finished.stderr


if __name__ == "__main__":
    main()
