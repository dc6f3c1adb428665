"""What the figures were measured on."""

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Name the processor, the memory, the GPU where there is one, and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, {memory:.0f} GiB{gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
