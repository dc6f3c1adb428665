#!/usr/bin/env bash
# timm and torchvision give the class folders of one data set different numbers.
#
# Versions: timm 1.0.31, torchvision 0.29.2, torch 2.15.0, Python 3.11.
# Expected: both sort the names of the folders, so that both readers of one folder agree on which class is 2.
# Seen:
#     timm         {'1': 0, '2': 1, '10': 2, 'a': 3, 'B': 4}
#     torchvision  {'1': 0, '10': 1, '2': 2, 'B': 3, 'a': 4}
#     timm sorts numbers by value and letters without case, torchvision by code points.
# Why it matters: a head trained with one and evaluated with the other is scored on permuted classes (Oxford Flowers
#     has the folders 1 to 102, and class names often differ in case). The accuracy falls, and no shape or count tells
#     why.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 timm==1.0.31 pillow==13.0.0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet $packages
fi
cd "$folder"
"$python" - $packages <<'PYTHON'
import sys
from importlib.metadata import version

pins = dict(pin.split("==") for pin in sys.argv[1:])
assert all(version(name).partition("+")[0] == pin for name, pin in pins.items()), "other versions than those named above"

from pathlib import Path

from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

for name in ("1", "2", "10", "B", "a"):
    Path("photos", name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(Path("photos", name, "0.png"))
by_timm, by_torchvision = create_dataset("", "photos").reader.class_to_idx, ImageFolder("photos").class_to_idx
print("timm        ", by_timm)
print("torchvision ", by_torchvision)
assert by_timm == {"1": 0, "2": 1, "10": 2, "a": 3, "B": 4}
assert by_torchvision == {"1": 0, "10": 1, "2": 2, "B": 3, "a": 4}
PYTHON
