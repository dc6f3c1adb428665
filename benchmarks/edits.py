"""What each edit costs: seconds for vit_b_16, and seconds and memory for a network of a billion parameters on meta.

    python benchmarks/edits.py

Each edit is made on the same network, the check on shapes included; the time is the median of the repeats. The large
network has no weights; the growth of the process's peak memory over all edits stands beside it.
"""

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.models import VisionTransformer

import regraft

LAST, MIDDLE = "encoder.layers.encoder_layer_{}", "encoder.layers.encoder_layer_5"
Edit = Callable[[nn.Module], nn.Module]


def main() -> None:
    """Time every edit on both networks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.device("meta"):
        large = VisionTransformer(224, 14, num_layers=32, num_heads=16, hidden_dim=1664, mlp_dim=6656)
    before_mib = peak_mib()
    for name, model, repeats in (("vit_b_16", models.vit_b_16(), arguments.repeats), ("on meta", large, 1)):
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"\n{name}, {count:,} parameters")
        for words, edit in edits(model).items():
            seconds = [timed(edit, model) for _ in range(repeats)]
            print(f"  {words:28}{statistics.median(seconds):6.2f} s (most {max(seconds):.2f})", flush=True)
        if model is large:
            print(f"  peak memory grew by {peak_mib() - before_mib:.0f} MiB, vit_b_16 and its edits included")


def edits(model: nn.Module) -> dict[str, Edit]:
    """Return every kind of edit, as it is made on a vision transformer of torchvision."""
    width = model.get_submodule("conv_proj").weight.shape[0]
    last = LAST.format(len(model.get_submodule("encoder.layers")) - 1)
    return {
        "replace_head": lambda model: regraft.replace_head(model, 10),
        "replace_stem": lambda model: regraft.replace_stem(model, 4),
        "replace every GELU": lambda model: regraft.replace(model, "type:GELU", nn.ReLU()),
        "remove a block": lambda model: regraft.remove(model, last),
        "insert a linear layer": lambda model: regraft.insert(model, nn.Linear(width, width), after=MIDDLE),
        "truncate": lambda model: regraft.truncate(model, after=MIDDLE),
        "truncate, append": lambda model: regraft.append(regraft.truncate(model, after=MIDDLE), 10),
        "stitch": lambda model: regraft.stitch(model, model, cut=(MIDDLE, MIDDLE)),
    }


def timed(edit: Edit, model: nn.Module) -> float:
    """Return the seconds of one edit."""
    began = time.perf_counter()
    edit(model)
    return time.perf_counter() - began


def peak_mib() -> float:
    """Return the most memory that this process ever had; not ru_maxrss, which it takes over from its parent."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
