"""What a photo costs where there are very many: bytes of memory and disk, and seconds to list and read them.

    python benchmarks/scale.py

Writes 2 GiB into a temporary folder and takes six minutes on two cores. The table of peak memory is that of runs with
8,000 and 80,000 photos at the same options; each is a process of its own. `docs/scale.md` multiplies these figures.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
LISTED, LIST_SIDES = 10_000, (500, 375)  # photos as on the H200 of docs/scale.md
SMALL, SMALL_SIDE, PER_SHARD = (8_000, 80_000), 32, 4_000
KINDS = {
    "head": "head only, features in a file",
    "file": "everything trained, photos in a file",
    "access": "everything trained, read on access",
}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help="train once, and print what it took")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(train(*arguments.one)))
        return
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": machine.describe(), "listing": listing(Path(folder)), "features": features(Path(folder))}
    with tempfile.TemporaryDirectory() as folder:
        result["memory"] = memory(Path(folder))
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/scale.json").write_text(json.dumps(result, indent=1))


def encoded(count: int, sides: tuple[int, int]) -> list[bytes]:
    """Draw photos with the bytes of real ones: smooth, with some noise."""
    import numpy as np
    from PIL import Image

    drawn, photos = np.random.default_rng(0), []
    for number in range(count):
        coarse = drawn.integers(0, 128, (8, 8, 3)) + 100 * (number % 2)
        image = Image.fromarray(coarse.astype(np.uint8)).resize(sides, Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) + drawn.normal(0, 10, (sides[1], sides[0], 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def write_tars(folder: Path, count: int, photos: list[bytes], per_shard: int = PER_SHARD) -> None:
    """Write tar shards, of which a tenth is for validation, with a header of pax for each file as webdataset does."""
    for shard, first in enumerate(range(0, count, per_shard)):
        part = "val" if shard % 10 == 0 else "train"
        with tarfile.open(folder / f"{part}-{shard:06}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for number in range(first, min(first + per_shard, count)):
                label = str(number % 2).encode()
                for name, content in ((f"{number:08}.jpg", photos[number % len(photos)]), (f"{number:08}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(content), time.time()
                    archive.addfile(member, io.BytesIO(content))


def write_files(folder: Path, count: int, photos: list[bytes]) -> None:
    """Write a folder for each of two classes."""
    for number in range(count):
        file = folder / str(number % 2) / f"{number:08}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(photos[number % len(photos)])


def write_table(folder: Path, count: int, photos: list[bytes]) -> None:
    """Write a parquet file in row groups of 100 MB, as `datasets` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = sum(map(len, photos)) // len(photos)
    rows = [{"bytes": photos[number % len(photos)], "path": None} for number in range(count)]
    table = pa.table({"image": rows, "label": [number % 2 for number in range(count)]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=100_000_000 // size)


def listing(folder: Path) -> list[dict[str, Any]]:
    """Measure how long it takes to list 10,000 photos and to read their bytes in order, and the memory of the list."""
    from regraft.data.folders import list_data
    from regraft.data.sources import read_bytes

    photos = encoded(50, LIST_SIDES)
    size = sum(map(len, photos)) / len(photos)
    print(f"\n{LISTED:,} photos of {LIST_SIDES[0]} × {LIST_SIDES[1]}, {size / 1000:.0f} kB each, in the system's cache")
    print(f"{'':8} {'list':>10} {'list':>12} {'memory':>12} {'at most':>12} {'read':>10} {'files':>7}")
    writers: dict[str, Callable[..., None]] = {"files": write_files, "tar": write_tars, "parquet": write_table}
    rows = []
    for kind, write in writers.items():
        place = folder / kind
        place.mkdir()
        write(place, LISTED, photos)
        list_data(place)
        began = time.perf_counter()
        samples = [sample for part in [list_data(place)] for sample in (*part.train, *part.validation)]
        list_s = time.perf_counter() - began
        samples.sort(key=lambda sample: str(sample.path))
        began = time.perf_counter()
        read = sum(len(read_bytes(sample.path)) for sample in samples)
        read_s = time.perf_counter() - began
        samples.clear()
        tracemalloc.start()
        kept = list_data(place)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
        rows.append(
            {
                "kind": kind,
                "list_s": list_s,
                "bytes_a_photo": after / LISTED,
                "peak_bytes_a_photo": peak / LISTED,
                "read_bytes_a_second": read / read_s,
                "files": sum(1 for file in place.rglob("*") if file.is_file()),
            }
        )
        row = rows[-1]
        print(
            f"{kind:8} {list_s:8.2f} s {list_s / LISTED * 1e6:6.0f} µs each {row['bytes_a_photo']:7,.0f} B each "
            f"{row['peak_bytes_a_photo']:7,.0f} B each {row['read_bytes_a_second'] / 1e9:5.1f} GB/s {row['files']:7,}",
            flush=True,
        )
    return rows


def features(folder: Path) -> dict[str, float]:
    """Measure the cache of features: how fast they are written with their checksums, and found and read again."""
    import torch

    from regraft.frontier.cache.store import Store
    from regraft.frontier.cache.writer import FeatureWriter
    from regraft.progress import SILENT

    store, rows = Store(folder / "cache"), torch.randn(256, 2048)
    size = 500 * 2**20
    began = time.perf_counter()
    with FeatureWriter(store, "features", size, in_memory=False, progress=SILENT) as writer:
        for _ in range(size // rows.nbytes):
            writer.append([rows])
        writer.finish({"holds": "rows"})
    write_s = time.perf_counter() - began
    began = time.perf_counter()
    entry = store.find("features")
    assert entry is not None
    find_s = time.perf_counter() - began
    (tensor,) = entry.tensors(in_memory=False)
    order = torch.randperm(len(tensor))[:20_000]
    began = time.perf_counter()
    for batch in order.split(256):
        tensor[batch]
    rows_s = time.perf_counter() - began
    rates = {"written": size / write_s, "checked": size / find_s, "rows_a_second": len(order) / rows_s}
    print(
        f"\nfeatures in the cache: written at {rates['written'] / 1e9:.1f} GB/s, checked at "
        f"{rates['checked'] / 1e9:.1f} GB/s, {rates['rows_a_second']:,.0f} rows/s of 8 kB in any order"
    )
    return rates


def memory(folder: Path) -> list[dict[str, Any]]:
    """Measure the peak memory of the process at two numbers of photos, with the same options."""
    photos = encoded(50, (SMALL_SIDE, SMALL_SIDE))
    for count in SMALL:
        (folder / str(count)).mkdir()
        write_tars(folder / str(count), count, photos, PER_SHARD // 10 if count < 10_000 else PER_SHARD)
    print("\npeak memory of the process, tar shards, 2 epochs")
    print(f"{'':40} " + " ".join(f"{count:>8,} photos" for count in SMALL) + "   bytes for each more")
    rows = []
    for kind, title in KINDS.items():
        runs = []
        for count in SMALL:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "REGRAFT_CACHE": str(folder / f"cache-{kind}-{count}")}
            command = [sys.executable, __file__, "--one", kind, str(folder / str(count))]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            runs.append(json.loads(answer))
        peaks = [run["peak_mib"] for run in runs]
        more = (peaks[1] - peaks[0]) * 2**20 / (SMALL[1] - SMALL[0])
        rows.append({"kind": kind, "runs": runs, "bytes_a_photo": more})
        print(f"{title:40} " + " ".join(f"{peak:>11,.0f} MiB" for peak in peaks) + f"   {more:,.0f}", flush=True)
    return rows


def train(kind: str, folder: str) -> dict[str, float]:
    """Train a small network for two epochs, and return seconds and peak memory."""
    import torch
    from torch import nn

    import regraft
    from regraft.data import photos
    from regraft.training.features import extract, pixels

    # As where there are too many for memory, whatever this machine has.
    extract.MEMORY_BYTES = 0
    for module in (photos, pixels):
        module.fit_memory = lambda *_: False
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, SMALL_SIDE, SMALL_SIDE))
    if kind == "head":
        regraft.freeze(model, "0")
    options = {"cache": False, "workers": 1} if kind == "access" else {}
    began = time.perf_counter()
    regraft.fit(model, folder, epochs=2, batch_size=256, image_size=SMALL_SIDE, lr=1e-3, progress=False, **options)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mib": peak_bytes() / 2**20}


def peak_bytes() -> int:
    """Return the peak memory of this process alone; `ru_maxrss` begins with that of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
