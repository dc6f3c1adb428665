"""Peak memory with 2,000 and with 200,000 photos whose features lie in a file, and bytes on the disk.

    python benchmarks/memory.py

Photos of 16 × 16 pixels are drawn into a temporary folder (1 GiB on the disk); each run is a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

HERE = Path(__file__).parent
SIDE, CHANNELS = 16, 16


def main() -> None:
    """Run both sizes, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=[2_000, 200_000])
    parser.add_argument("--one", type=Path, help="train once on this folder, and print what it took")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(train(arguments.one, *arguments.counts)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.counts:
            photos, cache = Path(folder, f"photos-{count}"), Path(folder, f"cache-{count}")
            draw(photos, count)
            environment = {**os.environ, "REGRAFT_CACHE": str(cache)}
            command = [sys.executable, __file__, "--one", str(photos), "--counts", str(count)]
            said = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            )
            used = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            found.append({"photos": count, **said, "disk_bytes": used})
            print(
                f"{count:>9,} photos: peak {said['peak_mib']:,.0f} MiB, {said['seconds']:.0f} s, "
                f"{used / 2**20:,.1f} MiB on the disk, {said['estimated_bytes'] / 2**20:,.1f} estimated",
                flush=True,
            )
    (HERE / "results").mkdir(exist_ok=True)
    result = {"machine": machine.describe(), "runs": found}
    (HERE / "results/memory.json").write_text(json.dumps(result, indent=1))


def draw(folder: Path, count: int) -> None:
    """Write photos of two classes, a tenth of them for validation."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)
    for number in range(count):
        part = "val" if number % 10 == 0 else "train"
        label = "dark" if number // 10 % 2 else "light"
        place = folder / part / label / f"{number // 1000}"
        if number % 1000 < 20:
            place.mkdir(parents=True, exist_ok=True)
        pixels = drawn.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8) + (0 if label == "dark" else 100)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.bmp")


def train(photos: Path, count: int) -> dict[str, float]:
    """Train the last layer of a small network for two epochs, after estimating from its frontier what is kept."""
    import torch
    from torch import nn

    import regraft
    from regraft import fit, partition
    from regraft.training.features import extract

    extract.MEMORY_BYTES = 0  # both counts go through the file
    example = torch.zeros(1, 3, SIDE, SIDE)
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, 4, 3), nn.Flatten(), nn.LazyLinear(2)
    )
    model(example)
    regraft.freeze(model, "0")
    estimated = count * partition(model, example).bytes
    began = time.perf_counter()
    fit(model, photos, epochs=2, batch_size=256, image_size=SIDE, augment="none", lr=1e-3)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mib": peak_kib / 1024, "estimated_bytes": estimated}


if __name__ == "__main__":
    main()
