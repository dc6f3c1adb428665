"""How many versions of each photo are worth computing: accuracy and seconds for 1, 2, 4, 8, and a new one each time.

    python benchmarks/views.py

Head only, MobileNetV1 × 0.25 with ImageNet weights, on hymenoptera, with the mean over seeds.
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

import regraft
from regraft import fit

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "contenders"))
import task  # noqa: E402

CHOICES: dict[str, dict[str, Any]] = {
    "1": {"augment": "none"},
    "2 (mirrored; the default)": {"augment": "flip"},
    "2 random": {"augment": "standard", "views": 2},
    "4 random": {"augment": "standard", "views": 4},
    "8 random": {"augment": "standard", "views": 8},
    "uncached, a new one each epoch": {"augment": "standard"},
}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    sys.argv = sys.argv[:1]
    options = task.read_options()
    rows = {}
    for name, choice in CHOICES.items():
        results, seconds = [], []
        for seed in range(seeds if "views" in choice or choice["augment"] != "standard" else min(seeds, 3)):
            options.seed = seed
            network = task.build(options)
            regraft.freeze(network)
            regraft.unfreeze(network, "fc")
            with tempfile.TemporaryDirectory() as folder:
                os.environ["REGRAFT_CACHE"] = folder
                began = time.perf_counter()
                results.append(fit(network, options.data, seed=seed, **choice))
                seconds.append(time.perf_counter() - began)
        last = [result.history[-1].validation.accuracy or 0.0 for result in results]
        kept = [result.validation.accuracy or 0.0 for result in results]
        rows[name] = {"seconds": statistics.median(seconds), "last": spread(last), "kept": spread(kept)}
        print(
            f"{name:32} {rows[name]['seconds']:7.2f} s  last {rows[name]['last']}  kept {rows[name]['kept']}",
            flush=True,
        )
    (HERE / "results").mkdir(exist_ok=True)
    title = f"MobileNetV1 × 0.25, head only, hymenoptera, 25 epochs, {seeds} seeds (3 for the last row)."
    (HERE / "results/views.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))


def spread(values: list[float]) -> str:
    """Write the mean, and the least and the most."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    main()
