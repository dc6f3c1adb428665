#!/usr/bin/env bash
# Freezing layers with timm.utils and thawing them again resets the momentum of their batch norms.
#
# Versions: timm 1.0.31, torch 2.15.0, Python 3.11.
# Expected: unfreeze undoes freeze: the batch norms are as they were.
# Seen:
#     momentum before, after  0.01 0.1
#     epsilon before, after   0.001 0.001
# Why it matters: head first, then everything is the usual schedule. From the thaw on running statistics follow the
#     last few batches ten times faster than the network was set to, which shows with small batches in the validation
#     alone.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 timm==1.0.31"
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

import timm
from timm.utils import freeze, unfreeze

model = timm.create_model("tf_efficientnet_b0", bn_momentum=0.01)
before = model.bn1.momentum, model.bn1.eps
freeze(model)
unfreeze(model)
after = model.bn1.momentum, model.bn1.eps
print("momentum before, after ", before[0], after[0])
print("epsilon before, after  ", before[1], after[1])
assert before == (0.01, 0.001)
assert after == (0.1, 0.001)
PYTHON
