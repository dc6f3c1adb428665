"""Pretrained against from scratch on a few photos: accuracy and seconds, with default options.

    python benchmarks/few_images.py --data ../shared/data --weights ../shared/weights/mobilenetV1X0.25_pretrain.tar

`--data` holds the folders `car_vs_bicycle_mini` (20 photos to learn from) and `hymenoptera` (245); `--weights` is the
ImageNet checkpoint of bubbliiiing/retinaface-pytorch.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

import regraft

ROOT = Path(__file__).resolve().parents[1]
MODEL = f"py:{ROOT / 'examples/mobilenet_v1.py'}:MobileNetV1"


def main() -> None:
    """Run both starts on both folders, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--weights", type=Path, default=ROOT.parent / "shared/weights/mobilenetV1X0.25_pretrain.tar")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'data':22}{'start':14}{'best epoch':>22}{'last epoch':>22}{'seconds':>10}")
    for data in ("car_vs_bicycle_mini", "hymenoptera"):
        for start, weights in (("pretrained", str(arguments.weights)), ("from scratch", "none")):
            best, last, seconds = [], [], []
            for seed in range(arguments.seeds):
                began = time.perf_counter()
                result = regraft.fit(MODEL, arguments.data / data, weights=weights, seed=seed, trust_code=True)
                seconds.append(time.perf_counter() - began)
                best.append(result.validation.accuracy or 0.0)
                last.append(result.history[-1].validation.accuracy or 0.0)
            print(
                f"{data:22}{start:14}{spread(best):>22}{spread(last):>22}{statistics.mean(seconds):>10.1f}", flush=True
            )


def spread(values: list[float]) -> str:
    """Write the mean, and the least and the most."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    main()
