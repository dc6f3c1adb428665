#!/usr/bin/env bash
# nn.TransformerEncoder in training mode fails with a padding mask as soon as its first layer alone is in evaluation
# mode.
#
# Versions: torch 2.15.0, Python 3.11.
# Expected: freezing the first layer and putting it into evaluation mode, so that its dropout rests, leaves the
#     encoder as it was.
# Seen:
#     first layer evaluated   AssertionError
#     second layer evaluated  (2, 6, 16)
#     The encoder looks at its first layer to choose the path for nested tensors, which layers in training mode do not take.
# Why it matters: lower layers are frozen first. The error comes in the first training step, speaks of neither
#     freezing nor modes, and does not come without a mask or with another layer frozen.
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

import warnings

warnings.simplefilter("ignore")
import torch
from torch import nn

padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


def outcome(frozen):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train()
    encoder.layers[frozen].requires_grad_(False).eval()
    try:
        return str(tuple(encoder(torch.randn(2, 6, 16), src_key_padding_mask=padding).shape))
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__


first, second = outcome(0), outcome(1)
print("first layer evaluated  ", first)
print("second layer evaluated ", second)
assert first == "AssertionError"
assert second == "(2, 6, 16)"
PYTHON
