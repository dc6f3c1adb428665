#!/usr/bin/env bash
# skorch's Freezer leaves the running statistics of the layers that it freezes moving.
#
# Versions: skorch 1.4.0, torch 2.15.0, Python 3.11.
# Expected: a layer that a callback called Freezer freezes computes the same before and after training.
# Seen:
#     changed: running_mean, running_var, num_batches_tracked
#     output of the frozen layer moved by up to 4.5
# Why it matters: scikit-learn users meet pretrained networks here. What they take for a fixed extractor of features
#     drifts with every batch, and features saved before the fit do not belong to the network after it.
set -euo pipefail
packages="torch==2.15.0 skorch==1.4.0 scikit-learn==1.9.1 numpy==2.4.6"
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
from skorch import NeuralNetClassifier
from skorch.callbacks import Freezer
from torch import nn

torch.manual_seed(0)
inputs = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32) * 0.1 + 2
model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
outputs = model[0].eval()(torch.from_numpy(inputs))
before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
options = {"lr": 0.1, "max_epochs": 20, "batch_size": 16, "verbose": 0, "train_split": None}
net = NeuralNetClassifier(model, criterion=nn.CrossEntropyLoss, callbacks=[Freezer("0.*")], **options)
net.fit(inputs, (inputs[:, 0] > 2).astype(np.int64))
changed = [name for name, tensor in model[0].state_dict().items() if not torch.equal(tensor, before[name])]
moved = (model[0].eval()(torch.from_numpy(inputs)) - outputs).abs().max().item()
print("changed:", ", ".join(changed))
print(f"output of the frozen layer moved by up to {moved:.1f}")
assert not any(parameter.requires_grad for parameter in model[0].parameters())
assert changed == ["running_mean", "running_var", "num_batches_tracked"]
assert moved > 1
PYTHON
