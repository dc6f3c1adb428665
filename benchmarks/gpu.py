"""The job on a GPU: decoding, the pass over the photos, the head, and fine-tuning, beside a tuned loop and the limits.

`python benchmarks/gpu.py` on a machine with CUDA prints one table, in a few minutes; `make gpu` runs it after the
tests. `--device cpu --photos 60 --side 64 --epochs 2` runs the same code on a CPU, to see that it works; its figures
say nothing of a GPU.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import regraft
from regraft.card import Preprocessing
from regraft.data.decoding.engines import usable_engine
from regraft.data.decoding.files import decode_all

CLASSES = 10
SIZE = (500, 375)
FORWARD_BATCH, HEAD_BATCH, TRAIN_BATCH = 256, 256, 64


def main() -> None:
    """Measure, and print the table."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "photos"
        seconds = write_photos(root, options.photos)
        print(machine.describe())
        print(f"{options.photos} JPEGs of {SIZE[0]} × {SIZE[1]}, written in {seconds:.1f} s; {options.epochs} epochs\n")
        decoding = measure_decoding(root, options)
        for name in options.models:
            measure_head(name, root, decoding, options)
        measure_everything(options.models[0], root, options)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--photos", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16"])
    options = parser.parse_args()
    options.device = torch.device(options.device)
    return options


def write_photos(root: Path, count: int) -> float:
    """Write photos of ten classes, a fifth of them for validation, and return the seconds."""
    began = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_photo, [root] * count, range(count), chunksize=50))
    return time.perf_counter() - began


def write_photo(root: Path, number: int) -> None:
    """Write one photo: waves whose direction tells the class, and noise as a camera's."""
    label, part = number % CLASSES, "val" if number // CLASSES % 5 == 0 else "train"
    rows, columns = np.mgrid[0 : SIZE[1], 0 : SIZE[0]] / 60
    angle = np.pi * label / CLASSES
    wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 3 + number)
    noise = np.random.default_rng(number).normal(0, 14, (SIZE[1], SIZE[0], 3))
    pixels = np.clip(127 + 90 * wave[..., None] * [1, 0.6, 0.3] + noise, 0, 255).astype(np.uint8)
    folder = root / part / f"class{label}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=88)


def synchronized(device: torch.device) -> float:
    """Return the time after the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_of(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Return the median seconds of some work, after one round that does not count."""
    work()
    times = []
    for _ in range(repeats):
        began = synchronized(device)
        work()
        times.append(synchronized(device) - began)
    return statistics.median(times)


def report(what: str, seconds: float, photos: int, note: str = "") -> None:
    """Print a row."""
    print(f"{what:<58} {seconds:9.2f} s {photos / seconds:10,.0f} photos/s  {note}".rstrip(), flush=True)


def measure_decoding(root: Path, options: argparse.Namespace) -> float:
    """Print the rate of each engine, and return the seconds of the fastest."""
    paths = sorted(root.glob("*/*/*.jpg"))
    fastest = float("inf")
    for engine in ("pillow", "native", "nvjpeg"):
        preprocessing = Preprocessing(size=options.side, resize=round(options.side * 8 / 7), decoder=engine)
        if usable_engine(engine, preprocessing, options.device) != engine:
            print(f"decoding, {engine}: not here")
            continue
        part = paths if engine == "nvjpeg" else paths[: max(1, len(paths) // 4)]
        if engine == "nvjpeg":
            list(decode_all(paths[:256], preprocessing))
        began = synchronized(options.device)
        list(decode_all(part, preprocessing))
        seconds = synchronized(options.device) - began
        report(f"decoding and resizing alone, {engine}", seconds, len(part))
        fastest = min(fastest, seconds * len(paths) / len(part))
    return fastest


def build(name: str, options: argparse.Namespace, *, frozen: bool) -> nn.Module:
    """Build a network without weights, which change no time."""
    torch.manual_seed(0)
    sides = {"image_size": options.side} if name.startswith("vit") else {}
    model: Any = models.get_model(name, weights=None, num_classes=CLASSES, **sides)
    if frozen:
        regraft.freeze(model)
        regraft.unfreeze(model, *[path for path, layer in model.named_modules() if is_last(layer)])
    return model


def is_last(layer: nn.Module) -> bool:
    """Return whether a layer gives the scores."""
    return isinstance(layer, nn.Linear) and layer.out_features == CLASSES


def autocast(options: argparse.Namespace) -> torch.autocast:
    """Return mixed precision in bfloat16, as on a GPU."""
    return torch.autocast(options.device.type, torch.bfloat16)


def loader(root: Path, part: str, batch_size: int, options: argparse.Namespace) -> DataLoader[Any]:
    """Return what people tune: worker processes, pinned memory, normalization on the device."""
    random = [v2.RandomResizedCrop(options.side, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
    plain = [v2.Resize(round(options.side * 8 / 7)), v2.CenterCrop(options.side)]
    steps = v2.Compose([*(random if part == "train" else plain), v2.PILToTensor()])
    return DataLoader(
        datasets.ImageFolder(root / part, steps),
        batch_size,
        shuffle=part == "train",
        num_workers=options.workers,
        pin_memory=options.device.type == "cuda",
        persistent_workers=options.workers > 0,
        drop_last=part == "train",
    )


def on_device(batches: Any, options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalized batches on the device."""
    usual = Preprocessing()
    mean, std = (torch.tensor(values, device=options.device).view(3, 1, 1) for values in (usual.mean, usual.std))
    for pixels, targets in batches:
        pixels = pixels.to(options.device, non_blocking=True, memory_format=torch.channels_last)
        yield (pixels.float() / 255 - mean) / std, targets.to(options.device, non_blocking=True)


def measure_head(name: str, root: Path, decoding: float, options: argparse.Namespace) -> None:
    """Train the head alone: the tuned loop, regraft, and what neither can do without."""
    device, count = options.device, len(list(root.glob("*/*/*.jpg")))
    print(f"\n{name}, head only")
    model = build(name, options, frozen=True).to(device, memory_format=torch.channels_last).eval()
    batch = torch.rand(min(FORWARD_BATCH, count), 3, options.side, options.side, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), autocast(options):
            model(batch)

    forward_s = median_of(forward, device) * count / len(batch)
    report("forward alone, bf16, batches of 256", forward_s, count)
    tuned = measure_tuned_head(name, root, options)
    report(f"tuned loop, {options.epochs} epochs (its second, times {options.epochs})", tuned, count * options.epochs)
    for views, augment in ((1, "none"), (2, "flip")):
        for _ in range(2 if views == 1 else 1):  # the first call of a process pays for the libraries of the device
            began = synchronized(device)
            result = regraft.fit(
                build(name, options, frozen=True),
                root,
                device=str(device),
                precision="bf16",
                augment=augment,
                epochs=options.epochs,
                image_size=options.side,
                progress=False,
                seed=views,
                cache_precision="full",
            )
            seconds = synchronized(device) - began
            clear_cache()
        note = f"{tuned / seconds:.1f} × the tuned loop; " + phases(result.seconds)
        report(f"regraft, {views} view{'s' * (views > 1)}", seconds, count * options.epochs, note)
        if views == 1:
            passed = result.seconds.get("features", 0.0)
            ratio = passed / max(decoding, forward_s)
            report("  the pass over the photos", passed, count, f"{ratio:.2f} × the slower of decoding and forward")


def phases(seconds: dict[str, float]) -> str:
    """Return the longest phases as text."""
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items() if value >= 0.05)


def clear_cache() -> None:
    """Forget what was computed, so that the next run computes it again."""
    shutil.rmtree(os.environ["REGRAFT_CACHE"], ignore_errors=True)


def measure_tuned_head(name: str, root: Path, options: argparse.Namespace) -> float:
    """Return the seconds of all epochs of a loop that runs the frozen part without gradients in each."""
    model = build(name, options, frozen=True).to(options.device, memory_format=torch.channels_last)
    ((head_path, head),) = [(path, layer) for path, layer in model.named_modules() if is_last(layer)]
    model.set_submodule(head_path, nn.Identity())
    model.eval()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    parts = {part: loader(root, part, HEAD_BATCH, options) for part in ("train", "val")}

    def epoch() -> None:
        for inputs, targets in on_device(parts["train"], options):
            with autocast(options):
                with torch.no_grad():
                    features = model(inputs)
                loss = F.cross_entropy(head(features), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode(), autocast(options):
            for inputs, _ in on_device(parts["val"], options):
                head(model(inputs))

    return median_of(epoch, options.device, repeats=1) * options.epochs


def measure_everything(name: str, root: Path, options: argparse.Namespace) -> None:
    """Train everything: the tuned loop, regraft from the first and the second epoch on, and synthetic input."""
    device = options.device
    count = len(list(root.glob("train/*/*.jpg")))
    print(f"\n{name}, everything trained, batches of {TRAIN_BATCH}")

    def trainer() -> Callable[[torch.Tensor, torch.Tensor], None]:
        model = build(name, options, frozen=False).to(device, memory_format=torch.channels_last)
        is_fused = {"fused": True} if device.type == "cuda" else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **is_fused)

        def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
            with autocast(options):
                loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = trainer()
    inputs = torch.rand(TRAIN_BATCH, 3, options.side, options.side, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.arange(TRAIN_BATCH, device=device) % CLASSES
    steps = 50 if device.type == "cuda" else 2

    def synthetic() -> None:
        for _ in range(steps):
            step(inputs, targets)

    synthetic_s = median_of(synthetic, device) * count / (steps * TRAIN_BATCH)
    report("synthetic input, an epoch", synthetic_s, count)
    step, batches = trainer(), loader(root, "train", TRAIN_BATCH, options)

    def epoch() -> None:
        for batch in on_device(batches, options):
            step(*batch)

    began = synchronized(device)
    epoch()
    first = synchronized(device) - began
    tuned = median_of(epoch, device, repeats=1)
    report("tuned loop, first epoch", first, count)
    report("tuned loop, later epochs", tuned, count)
    common: dict[str, Any] = {
        "device": str(device),
        "precision": "bf16",
        "augment": "standard",
        "batch_size": TRAIN_BATCH,
        "image_size": options.side,
        "lr": 1e-3,
        "progress": False,
    }
    regraft.fit(build(name, options, frozen=False), root, epochs=1, **common)  # the libraries of the device start
    clear_cache()
    result = regraft.fit(build(name, options, frozen=False), root, epochs=3, **common)
    measured = result.seconds.get("validation", 0.0) / 3
    later = statistics.median(record.seconds - measured for record in result.history[1:])
    first_s = result.history[0].seconds - measured + result.seconds.get("reading", 0.0)
    report("regraft, first epoch and reading", first_s, count, f"{first / first_s:.2f} × the tuned loop's")
    note = f"{tuned / later:.2f} × the tuned loop, {synthetic_s / later:.2f} of synthetic input"
    report("regraft, later epochs", later, count, note)
    if device.type == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
