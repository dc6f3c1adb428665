#!/usr/bin/env bash
# torchinfo counts the multiply-adds of a linear layer for one token, however many there are.
#
# Versions: torchinfo 1.8.0, torch 2.15.0, Python 3.11.
# Expected: a linear layer of 64 × 64 on 100 tokens takes 409,600 multiply-adds, as torch's own counter says; a 1 × 1
#     convolution on 100 pixels takes the same, and torchinfo counts it so.
# Seen:
#     linear of 100 tokens       torch 409600  torchinfo 4160
#     convolution of 100 pixels  torch 409600  torchinfo 416000
#     (4,160 and 416,000: with the bias.)
# Why it matters: who chooses a backbone by its cost sees a vision transformer at a small part of the cost of a
#     convolutional network of the same work: 0.03 instead of 1.25 billion for timm's vit_tiny_patch16_224.
set -euo pipefail
packages="torch==2.15.0 torchinfo==1.8.0"
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
import torchinfo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count(layer, inputs):
    with FlopCounterMode(display=False) as counter:
        layer(inputs)
    return counter.get_total_flops() // 2, torchinfo.summary(layer, input_data=inputs, verbose=0).total_mult_adds


linear = count(nn.Linear(64, 64), torch.randn(1, 100, 64))
convolution = count(nn.Conv2d(64, 64, 1), torch.randn(1, 64, 10, 10))
print("linear of 100 tokens       torch {}  torchinfo {}".format(*linear))
print("convolution of 100 pixels  torch {}  torchinfo {}".format(*convolution))
assert linear == (409_600, 4_160)
assert convolution == (409_600, 416_000)
PYTHON
