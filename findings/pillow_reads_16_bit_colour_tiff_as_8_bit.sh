#!/usr/bin/env bash
# Pillow opens a TIFF with 16-bit colour as 8-bit colour, and one with 16-bit gray as it is.
#
# Versions: pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6, Python 3.11.
# Expected: either all 16 bits, as with gray, or an error, as with floating-point colour.
# Seen:
#     colour  RGB uint8, 4 of 1024 different values
#     gray    I;16 uint16, 1024 of 1024 different values
# Why it matters: microscopes and satellites write 12 bits into 16. Everything below 256 becomes 0: of such a photo
#     four gray levels are left, and a network learns from those without a word.
set -euo pipefail
packages="pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6"
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
import tifffile
from PIL import Image

values = np.arange(1024, dtype=np.uint16).reshape(32, 32)
seen = {}
for label, pixels in (("colour", np.stack([values] * 3, -1)), ("gray", values)):
    tifffile.imwrite("photo.tif", pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    assert np.array_equal(tifffile.imread("photo.tif"), pixels)
    with Image.open("photo.tif") as image:
        read = np.array(image)
        seen[label] = image.mode, read.dtype.name, len(np.unique(read))
    print(label.ljust(7), "{} {}, {} of 1024 different values".format(*seen[label]))
assert seen == {"colour": ("RGB", "uint8", 4), "gray": ("I;16", "uint16", 1024)}
PYTHON
