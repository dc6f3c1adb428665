#!/usr/bin/env bash
# skorch's fit starts afresh with a class of networks, and goes on from the last fit with a network.
#
# Versions: skorch 1.4.0, scikit-learn 1.9.1, torch 2.15.0, Python 3.11.
# Expected: fit forgets what an earlier fit learned, as scikit-learn's estimators do and as skorch's own partial_fit
#     does not.
# Seen:
#     loss of the first epoch, by fit  a class [0.993, 0.993], a network [0.993, 0.415]
#     The network that was passed is itself trained, not a copy.
# Why it matters: pretrained networks are passed as objects. A loop over folds or seeds with net.fit(…) trains each
#     round on from the one before, which has seen what is now the validation part, and the pretrained weights are
#     gone after the first.
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
from torch import nn


class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)


inputs = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
targets = (inputs[:, 0] > 0).astype(np.int64)


def first_losses(module):
    options = {"lr": 0.1, "max_epochs": 20, "verbose": 0, "train_split": None, "iterator_train__shuffle": False}
    net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **options)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(round(float(net.fit(inputs, targets).history[0, "train_loss"]), 3))
    return losses


of_a_class = first_losses(Net)
torch.manual_seed(0)
network = Net()
before = network.weight.detach().clone()
of_a_network = first_losses(network)
print(f"loss of the first epoch, by fit  a class {of_a_class}, a network {of_a_network}")
assert of_a_class[0] == of_a_class[1] == of_a_network[0]
assert of_a_network[1] < 0.7 * of_a_network[0]
assert not torch.equal(network.weight, before)
PYTHON
