#!/usr/bin/env bash
# torch's FlopCounterMode counts nothing of an encoder layer that runs in evaluation mode without gradients.
#
# Versions: torch 2.15.0, Python 3.11.
# Expected: the count of a forward pass does not depend on whether gradients are recorded.
# Seen:
#     with gradients     2918400
#     without gradients  0
#     nn.TransformerEncoderLayer then takes a fused operation that the counter has no formula for.
# Why it matters: the cost of a frozen backbone is measured just so, in evaluation mode without gradients.
#     torchvision's vision transformers lose their attention in the count, and nothing is said.
set -euo pipefail
packages="torch==2.15.0 numpy==2.4.6"
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

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

layer, tokens = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(1, 100, 32)
with FlopCounterMode(display=False) as recorded:
    layer(tokens)
with FlopCounterMode(display=False) as unrecorded, torch.no_grad():
    layer(tokens)
print("with gradients    ", recorded.get_total_flops())
print("without gradients ", unrecorded.get_total_flops())
assert recorded.get_total_flops() > 1_000_000
assert unrecorded.get_total_flops() == 0
PYTHON
