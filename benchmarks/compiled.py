"""From how many photos on `torch.compile` would pay for the constant part: seconds to compile, and saved per photo.

    python benchmarks/compiled.py

The constant part as `fit` runs it (batch norms folded, channels last) beside the same compiled, in turns, on batches as
large as `fit` makes them. Needs a C++ compiler.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from torchvision import models

import regraft
from regraft import partition
from regraft.anatomy.heads import find_heads
from regraft.frontier.fuse import faster
from regraft.training.features.extract import BATCH

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "contenders"))
import task  # noqa: E402

NAMES = ("mobilenet", "resnet18", "efficientnet_b0", "vit_b_32")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    sys.argv = sys.argv[:1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:  # what torch keeps of an earlier compilation is not found
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            rows[name] = row = measure(name, device, repeats)
        after = f"{row['pays_from']:,.0f}" if row["pays_from"] is not None else "never"
        print(
            f"{name:18} compiles in {row['compile_s']:5.1f} s; {row['eager_ms']:6.2f} ms a photo, compiled "
            f"{row['compiled_ms']:6.2f}; pays from {after} photos on",
            flush=True,
        )
    (HERE / "results").mkdir(exist_ok=True)
    result = {"machine": machine.describe(), "rows": rows}
    (HERE / "results/compiled.json").write_text(json.dumps(result, indent=1))


def measure(name: str, device: str, repeats: int) -> dict[str, Any]:
    """Return what compiling the constant part of one network costs and saves."""
    network = task.build(task.read_options()) if name == "mobilenet" else models.get_model(name, weights=None)
    network = network.to(device)
    regraft.freeze(network)
    regraft.unfreeze(network, *find_heads(network))
    eager = faster(partition(network, torch.empty(1, 3, 224, 224)).prefix)
    compiled = torch.compile(eager)
    batch = torch.randn(BATCH[device], 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        took(eager, batch)
        compile_s = took(compiled, batch)
        seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(repeats):
            seconds["eager"].append(took(eager, batch))
            seconds["compiled"].append(took(compiled, batch))
    each = {way: statistics.median(of) / len(batch) for way, of in seconds.items()}
    saved = each["eager"] - each["compiled"]
    return {
        "compile_s": compile_s,
        "eager_ms": 1000 * each["eager"],
        "compiled_ms": 1000 * each["compiled"],
        "pays_from": compile_s / saved if saved > 0 else None,
    }


def took(prefix: Any, batch: torch.Tensor) -> float:
    """Return the seconds of one batch."""
    began = time.perf_counter()
    prefix(batch)
    if batch.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
