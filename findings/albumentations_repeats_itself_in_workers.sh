#!/usr/bin/env bash
# In a DataLoader with workers, albumentations draws the same in every worker and in every epoch.
#
# Versions: albumentations 2.0.8, torch 2.15.0, Python 3.11, Linux (workers are forked).
# Expected: augmentation is new for each photo and in each epoch; torch seeds each worker differently each time, and
#     torchvision's transforms follow that.
# Seen:
#     albumentations  8 photos, 3 epochs: 4 different pictures
#     torchvision     8 photos, 3 epochs: 24 different pictures
#     The transform draws from a generator of its own, which each worker gets as a copy of the parent's; without workers they differ. Setting the seeds of random, NumPy and torch does not reach it.
# Why it matters: a few photos are augmented so that no epoch shows the same picture again. Here each photo has one
#     version for the whole training: memory and time for augmentation, with the effect of none, and the curves look
#     ordinary.
set -euo pipefail
packages="torch==2.15.0 albumentations==2.0.8 numpy==2.4.6"
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

import os
import warnings

warnings.simplefilter("ignore")
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class Photos(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(np.full((8, 8, 3), 100, np.uint8))


def different(transform, workers):
    loader = DataLoader(Photos(transform), batch_size=None, num_workers=workers)
    return len({round(float(value), 4) for _ in range(3) for value in loader})


brightness = A.Compose([A.RandomBrightnessContrast(brightness_limit=(-0.9, 0.9), contrast_limit=0, p=1)])
jitter = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ColorJitter(brightness=0.9)])
with_albumentations = lambda photo: torch.tensor(brightness(image=photo / np.float32(255))["image"].mean())
with_torchvision = lambda photo: jitter(photo).mean()
counts = {name: (different(t, 0), different(t, 2)) for name, t in (("albumentations", with_albumentations), ("torchvision", with_torchvision))}
for name, (_, count) in counts.items():
    print(f"{name.ljust(15)} 8 photos, 3 epochs: {count} different pictures")
assert [count for _, count in counts.values()] == [4, 24]
assert counts["albumentations"][0] > 12
PYTHON
