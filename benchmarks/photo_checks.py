"""What `regraft check` finds: planted near-duplicates and flipped labels, over several seeds.

    python benchmarks/photo_checks.py --seeds 5

Near-duplicates: 20 training photos are put into validation, cropped to 80-95 % of each side, mirrored, resized to half
to 1.3 times, and saved as JPEG of quality 60 (`all`), or a quarter of them each way alone (`each`). Labels: 10 % of all
photos get another class, drawn at random; they are compared with heads on both networks. `--data` and `--weights` are
folders of real photos and checkpoints; pairs that were not planted are printed, to be looked at.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe
from PIL import Image, ImageOps

import regraft
from regraft.data.checks.near_duplicates import find_near_duplicates
from regraft.data.checks.thumbnails import read_thumbnails

ROOT = Path(__file__).resolve().parents[1]
SETS = ("hymenoptera", "clothing10", "car_vs_bike")
PLANTED, TOP = 20, 20
WAYS = ("crop", "mirror", "resize", "jpeg")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--weights", type=Path, default=ROOT.parent / "shared/weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("copies", "labels"))
    parser.add_argument("--sets", nargs="+", default=SETS)
    arguments = parser.parse_args()
    print(describe())
    if arguments.only != "labels":
        print(f"{'copies of':14}{'altered':9}{'recall':>20}{'precision':>20}{'seconds':>9}{'photos':>8}")
        for name in arguments.sets:
            others: set[frozenset[str]] = set()
            for ways in ("all", "each"):
                runs = [copies(arguments.data / name, ways, seed) for seed in range(arguments.seeds)]
                recalls, precisions, seconds, counts, unplanted = zip(*runs, strict=True)
                others = others.union(*unplanted)
                print(
                    f"{name:14}{ways:9}{spread(recalls):>20}{spread(precisions):>20}"
                    f"{statistics.median(seconds):>9.2f}{counts[0]:>8}",
                    flush=True,
                )
            for pair in sorted(map(sorted, others)):
                print(f"  not planted: {' = '.join(pair)}")
    if arguments.only != "copies":
        print(f"{'labels of':14}{'network':11}{f'precision of {TOP}':>20}{'of all':>20}{'recall of all':>20}")
        for name in arguments.sets[:2]:
            for network in ("mobilenet", "lite0"):
                runs = [
                    labels(arguments.data / name, network, arguments.weights, seed) for seed in range(arguments.seeds)
                ]
                columns = "".join(f"{spread(values):>20}" for values in zip(*runs, strict=True))
                print(f"{name:14}{network:11}{columns}", flush=True)


def copies(data: Path, ways: str, seed: int) -> tuple[float, float, float, int, set[frozenset[str]]]:
    """Plant copies, and return recall, precision, seconds, the number of photos, and pairs that were not planted."""
    drawn = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, root := Path(folder, data.name))
        photos = [path for path in sorted(root.glob("train/*/*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        planted = set()
        for number, photo in enumerate(drawn.sample(photos, PLANTED)):
            copy = root / "val" / photo.parent.name / f"planted{number}.jpg"
            alter(photo, copy, drawn, WAYS if ways == "all" else WAYS[number % 4 :][:1])
            planted.add(frozenset((str(photo), str(copy))))
        paths = sorted(root.glob("*/*/*"))
        began = time.perf_counter()
        duplicates = find_near_duplicates(read_thumbnails(paths))
        seconds = time.perf_counter() - began
        pairs = {frozenset((str(paths[pair.first]), str(paths[pair.second]))) for pair in duplicates}
        hits = len(pairs & planted)
        others = {frozenset(str(Path(path).relative_to(root)) for path in pair) for pair in pairs - planted}
        real = {pair for pair in others if not any("planted" in path for path in pair)}
    return hits / PLANTED, hits / max(1, len(pairs)), seconds, len(paths), real


def alter(photo: Path, copy: Path, drawn: random.Random, ways: Sequence[str]) -> None:
    """Save a copy of a photo, changed in some ways."""
    image: Any = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    if "crop" in ways:
        width, height = (round(side * drawn.uniform(0.8, 0.95)) for side in image.size)
        left, top = drawn.randint(0, image.width - width), drawn.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    if "mirror" in ways:
        image = ImageOps.mirror(image)
    if "resize" in ways:
        factor = drawn.uniform(0.5, 1.3)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    image.save(copy, quality=60 if "jpeg" in ways else 92)


def labels(data: Path, network: str, weights: Path, seed: int) -> tuple[float, float, float]:
    """Flip labels, and return the precision of the first suspects and of all, and the recall of all."""
    drawn = random.Random(seed)
    options: dict[str, Any] = {
        "model": f"py:{ROOT / 'examples/mobilenet_v1.py'}:MobileNetV1",
        "weights": str(weights / "mobilenetV1X0.25_pretrain.tar"),
    }
    if network == "lite0":
        options = {
            "model": "timm/tf_efficientnet_lite0",
            "weights": str(weights / "efficientnet-lite0-57934424.pth"),
            "accept": "likely",
        }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(data, root := Path(folder, data.name))
        classes = sorted(path.name for path in (root / "train").iterdir())
        photos = sorted(root.glob("*/*/*"))
        flipped = set()
        for photo in drawn.sample(photos, round(len(photos) / 10)):
            other = drawn.choice([name for name in classes if name != photo.parent.name])
            flipped.add(str(photo.rename(photo.parents[1] / other / f"flipped-{photo.name}")))
        report = regraft.check(root, trust_code=True, progress=False, seed=seed, **options)
        suspects = [str(finding.path) for finding in report.findings if finding.problem == "label"]
    hits = [path in flipped for path in suspects]
    return statistics.mean(hits[:TOP]), statistics.mean(hits), sum(hits) / len(flipped)


def spread(values: Sequence[float]) -> str:
    """Write the mean, and the least and the most."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
