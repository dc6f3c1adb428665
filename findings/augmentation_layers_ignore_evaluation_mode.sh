#!/usr/bin/env bash
# Random transforms of torchvision and kornia are modules, and go on at random in evaluation mode.
#
# Versions: torchvision 0.29.2, kornia 0.9.0, torch 2.15.0, Python 3.11.
# Expected: model.eval() turns off what is random in a network, as it turns off dropout.
# Seen:
#     erased by torchvision in evaluation mode  True
#     flipped by kornia in evaluation mode      True
#     by dropout in evaluation mode             False
# Why it matters: augmentation on the GPU is commonly written as the first layer, nn.Sequential(transforms, backbone).
#     Validation, features that are computed once, and exported files are then random.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 kornia==0.9.0"
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

import warnings

warnings.simplefilter("ignore")
import kornia.augmentation as K
import torch
from torch import nn
from torchvision.transforms import v2

inputs = torch.arange(1.0, 193.0).view(1, 3, 8, 8)
changed = {
    name: not torch.equal(nn.Sequential(layer, nn.Identity()).eval()(inputs), inputs)
    for name, layer in {
        "erased by torchvision": v2.RandomErasing(p=1.0),
        "flipped by kornia": K.RandomHorizontalFlip(p=1.0),
        "by dropout": nn.Dropout(p=1.0),
    }.items()
}
for name, is_changed in changed.items():
    print(f"{name} in evaluation mode".ljust(41), is_changed)
assert list(changed.values()) == [True, True, False]
PYTHON
