#!/usr/bin/env bash
# Some of torch's schedulers follow a parameter group that is added while they run, others fail in their next step,
# one after changing the rates.
#
# Versions: torch 2.15.0, Python 3.11.
# Expected: schedulers treat a group that add_param_group adds alike: all follow it, or all refuse.
# Seen:
#     CosineAnnealingLR            [0.976, 0.098]
#     StepLR                       [0.25, 0.05]
#     CosineAnnealingWarmRestarts  ValueError [0.905, 0.1]
#     LambdaLR                     ValueError [0.25, 0.1]
#     OneCycleLR                   KeyError [0.132, 0.1]
#     rates of the old and the new group, 1.0 and 0.1 before, after the next step
# Why it matters: training the head first and adding the backbone as a group of its own is the usual way to thaw.
#     Whether it works depends on the scheduler; who catches the error trains on with rates that belong to no
#     schedule.
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
from torch.optim import lr_scheduler as schedulers

SCHEDULERS = {
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 20),
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 1, 0.5),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 10),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, 1.0, total_steps=20),
}
seen = {}
for name, build in SCHEDULERS.items():
    head, backbone = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scheduler = build(optimizer)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": backbone.parameters(), "lr": 0.1})
    optimizer.step()
    try:
        scheduler.step()
        error = ""
    except (ValueError, KeyError) as raised:
        error = type(raised).__name__
    seen[name] = error, [round(group["lr"], 3) for group in optimizer.param_groups]
    print(name.ljust(28), *filter(None, seen[name]))
assert [error for error, _ in seen.values()] == ["", "", "ValueError", "ValueError", "KeyError"]
assert seen["LambdaLR"][1] == [0.25, 0.1]
PYTHON
