#!/usr/bin/env bash
# update_bn empties the batch norms of a backbone that its network keeps in evaluation mode.
#
# Versions: torch 2.15.0, Python 3.11.
# Expected: a network whose train() leaves the batch norms of its frozen backbone in evaluation mode keeps their
#     statistics; update_bn fills those that train.
# Seen:
#     backbone  mean 2.0, variance 1.0
#     after     mean 0.0, variance 1.0
#     head      mean 2.0, variance 1.0
#     Every batch norm is reset first, and only those are filled that the network's own train() puts into training mode.
# Why it matters: such a train() is how frozen batch norms are usually held. After weight averaging the network has a
#     backbone without statistics: it returns scores as ever, and they are wrong.
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
from torch.optim.swa_utils import update_bn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, inputs):
        return self.backbone(inputs) + self.head(inputs)


def show(label, norm):
    print(f"{label.ljust(9)} mean {norm.running_mean.item():.1f}, variance {norm.running_var.item():.1f}")
    return norm.running_mean.item(), norm.running_var.item()


torch.manual_seed(0)
model = Net()
batches = [torch.randn(256, 1) + 2 for _ in range(100)]
for batch in batches:
    model.backbone.train()(batch)
before = show("backbone", model.backbone)
update_bn(batches, model)
after, head = show("after", model.backbone), show("head", model.head)
assert abs(before[0] - 2) < 0.1
assert after == (0, 1)
assert abs(head[0] - 2) < 0.1
PYTHON
