#!/usr/bin/env bash
# torchvision's v2 transforms flip a photo and not its mask where both are tensors, and both where they are Pillow
# images.
#
# Versions: torchvision 0.29.2, torch 2.15.0, pillow 13.0.0, Python 3.11.
# Expected: a transform that takes a pair treats both of it alike, whatever they are held in.
# Seen:
#     tensors       photo flipped True, mask flipped False
#     Pillow images  photo flipped True, mask flipped True
#     a Pillow mask of 0 and 200 resized  [0, 50, 150, 200]
#     Of several plain tensors only the first counts as an image; of Pillow images every one does, masks included.
# Why it matters: segmentation data sets return plain tensors or Pillow images. With the first, half of the masks do
#     not belong to their photos; with the second, resizing invents class numbers. Only tv_tensors.Mask gives what is
#     meant, and nothing asks for it.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 pillow==13.0.0 numpy==2.4.6"
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

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

photo, mask = torch.arange(12.0).view(3, 2, 2), torch.tensor([[0, 1], [0, 1]])
flip = v2.RandomHorizontalFlip(p=1.0)
flipped = flip(photo, mask)
as_tensors = torch.equal(flipped[0], photo.flip(-1)), torch.equal(flipped[1], mask.flip(-1))
pictures = [Image.fromarray(a) for a in (photo.permute(1, 2, 0).byte().numpy(), mask.byte().numpy())]
flipped = flip(*pictures)
as_pictures = tuple(np.array_equal(np.array(a), np.array(b)[:, ::-1]) for a, b in zip(flipped, pictures, strict=True))
_, resized = v2.Resize(4)(pictures[0], Image.fromarray(np.array([[0, 200], [0, 200]], np.uint8)))
print("tensors       photo flipped {}, mask flipped {}".format(*as_tensors))
print("Pillow images  photo flipped {}, mask flipped {}".format(*as_pictures))
print("a Pillow mask of 0 and 200 resized ", np.array(resized)[0].tolist())
assert as_tensors == (True, False)
assert as_pictures == (True, True)
assert np.array(resized)[0].tolist() == [0, 50, 150, 200]
PYTHON
