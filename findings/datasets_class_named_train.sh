#!/usr/bin/env bash
# The imagefolder loader of datasets takes a class folder called 'train' for a split, and leaves all other classes
# out.
#
# Versions: datasets 5.2.0, pillow 13.0.0, Python 3.11.
# Expected: three folders with three photos each are nine examples of the classes car, plane and train.
# Seen:
#     car, plane, bus {'train': 9} ['bus', 'car', 'plane']
#     car, plane, train {'train': 3}
#     dev, prod {'validation': 3}
#     train-station, harbour {'train': 3}
#     (classes, examples of each split, names of the labels where there are any)
# Why it matters: vehicles, cities with stations, or products 'dev' and 'prod' are ordinary classes. Two thirds of the
#     photos and every label are gone, and what is left trains without an error.
set -euo pipefail
packages="datasets==5.2.0 pillow==13.0.0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet $packages
fi
cd "$folder"
export HF_HOME=$folder/home HF_HUB_OFFLINE=1
"$python" - $packages <<'PYTHON'
import sys
from importlib.metadata import version

pins = dict(pin.split("==") for pin in sys.argv[1:])
assert all(version(name).partition("+")[0] == pin for name, pin in pins.items()), "other versions than those named above"

from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from PIL import Image

disable_progress_bars()


def load(*classes):
    root = Path("-".join(classes))
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8)).save(root / name / f"{index}.png")
    parts = load_dataset("imagefolder", data_dir=str(root), cache_dir="cache")
    counts = {split: len(part) for split, part in parts.items()}
    labels = [part.features["label"].names for part in parts.values() if "label" in part.features]
    print(", ".join(classes), counts, *labels)
    return counts, labels


assert load("car", "plane", "bus") == ({"train": 9}, [["bus", "car", "plane"]])
assert load("car", "plane", "train") == ({"train": 3}, [])
assert load("dev", "prod") == ({"validation": 3}, [])
assert load("train-station", "harbour") == ({"train": 3}, [])
PYTHON
