#!/usr/bin/env bash
# In a DataLoader with workers, albumentations draws the same in every worker and in every epoch.
#
# Versions: albumentations 2.0.8, torchvision 0.29.2, torch 2.15.0, Python 3.11, Linux (workers are forked).
# Expected: augmentation is new for each photo and in each epoch; torch seeds each worker differently each time, and
#     torchvision's transforms follow that.
# Seen:
#     albumentations  8 crops in 3 epochs: 24 different ones, 4 with workers
#     torchvision     8 crops in 3 epochs: 24 different ones, 24 with workers
#     The transform draws from a generator of its own, of which each worker gets a copy at the start of each epoch.
# Why it matters: a few photos are augmented so that no epoch shows the same picture again. Here each photo has one
#     version for the whole training, the same as a photo of another worker: the time for augmentation is spent, and
#     the curves look ordinary.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 albumentations==2.0.8 numpy==2.4.6"
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


PHOTO = np.arange(64 * 64, dtype=np.float32).reshape(64, 64, 1).repeat(3, 2)  # each pixel tells where it was


class Crops(Dataset):
    def __init__(self, crop):
        self.crop = crop

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return int(self.crop(PHOTO))


def different(crop, workers):
    loader = DataLoader(Crops(crop), batch_size=None, num_workers=workers)
    return len({int(corner) for _ in range(3) for corner in loader})


by_albumentations = A.Compose([A.RandomCrop(8, 8)])
by_torchvision = v2.Compose([v2.ToImage(), v2.RandomCrop(8)])
crops = {
    "albumentations": lambda photo: by_albumentations(image=photo)["image"][0, 0, 0],
    "torchvision": lambda photo: by_torchvision(photo)[0, 0, 0],
}
counts = {name: [different(crop, workers) for workers in (0, 2)] for name, crop in crops.items()}
for name, (alone, in_workers) in counts.items():
    print(f"{name.ljust(15)} 8 crops in 3 epochs: {alone} different ones, {in_workers} with workers")
assert counts["albumentations"][1] <= 4
assert min(counts["albumentations"][0], *counts["torchvision"]) > 16
PYTHON
