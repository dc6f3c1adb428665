"""`regraft.summary` against `torchinfo.summary`: milliseconds side by side; and a network of 7 billion parameters.

    python benchmarks/summary.py

The repeats alternate, so that all see the same machine, and everything runs on one thread: on two threads of a shared
machine a real forward, which torchinfo needs and regraft does not, can wait for its own threads for seconds, and the
comparison would say nothing about either. The column `forward` is that forward alone, as a control: where its spread is
wide, the machine was not quiet and the ratio is worth nothing. The large network has no weights: it is built on
the meta device, in a process of its own, whose peak memory is read at the end.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torchinfo
from torch import nn
from torchvision import models

import regraft

NAMES = ("resnet50", "vit_b_16")
IMAGE = (1, 3, 224, 224)
LARGE = """
import json, re, time
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import regraft.anatomy

def peak_kib():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

config = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
)
with torch.device("meta"):
    model = LlamaForCausalLM(config)
built = peak_kib()
began = time.perf_counter()
found = regraft.summary(model)
seconds = time.perf_counter() - began
assert found.problem is None, found.problem
peak = peak_kib()
root = found.layers[0]
print(json.dumps({
    "seconds": seconds, "peak_gib": peak / 2**20, "peak_before_gib": built / 2**20,
    "parameters": root.parameters, "multiply_adds": root.multiply_adds, "output_shape": root.output_shape,
    "note": found.note,
}))
"""


def main() -> None:
    """Time both on each network, and print a table; then measure the large one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'network':12}{'regraft ms':>20}{'torchinfo ms':>20}{'forward ms':>20}{'regraft / torchinfo':>22}")
    for name in NAMES:
        model = models.get_model(name)
        ours, theirs, forward = alternate(model, arguments.repeats)
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"{name:12}{spread(ours):>20}{spread(theirs):>20}{spread(forward):>20}{ratio:>22.2f}", flush=True)
    large = measure_large()
    print(
        f"Llama, {large['parameters']:,} parameters on meta: {large['seconds']:.1f} s, "
        f"peak {large['peak_gib']:.2f} GiB (of it {large['peak_before_gib']:.2f} before the summary)"
    )


def alternate(model: nn.Module, repeats: int) -> tuple[list[float], ...]:
    """Return the milliseconds of each repeat of regraft, torchinfo and a forward, after one unmeasured call of each."""
    model.eval()
    image = torch.rand(IMAGE)
    calls: tuple[Callable[[], object], ...] = (
        lambda: regraft.summary(model, IMAGE),
        lambda: torchinfo.summary(model, IMAGE, verbose=0, device="cpu"),
        torch.no_grad()(lambda: model(image)),
    )
    times: tuple[list[float], ...] = ([], [], [])
    for repeat in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if repeat:
                found.append(1000 * (time.perf_counter() - began))
    return times


def measure_large() -> dict[str, float]:
    """Summarise the large network in a process of its own."""
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def spread(values: list[float]) -> str:
    """Write the median, and the least and the most."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


if __name__ == "__main__":
    main()
