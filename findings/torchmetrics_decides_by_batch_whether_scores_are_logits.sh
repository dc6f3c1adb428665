#!/usr/bin/env bash
# The binary metrics of torchmetrics judge the same logit differently, by what else is in its batch.
#
# Versions: torchmetrics 1.9.0, torch 2.15.0, Python 3.11.
# Expected: logits above 0 count as the positive class, whether they come in one batch or in two.
# Seen:
#     one batch of five   1.0
#     batches of 4 and 1  0.2
#     Scores all of which lie between 0 and 1 are taken for probabilities, batch by batch, and compared with 0.5 as they are.
# Why it matters: a head that has just been put on a frozen backbone gives small logits, and the last batch of an
#     epoch may hold one photo. The accuracy then depends on the batch size and the order.
set -euo pipefail
packages="torch==2.15.0 torchmetrics==1.9.0"
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
from torchmetrics.classification import BinaryAccuracy

logits, targets = torch.tensor([0.1, 0.2, 0.3, 0.4, 2.0]), torch.ones(5, dtype=torch.long)
whole, split = BinaryAccuracy(), BinaryAccuracy()
whole.update(logits, targets)
split.update(logits[:4], targets[:4])
split.update(logits[4:], targets[4:])
print("one batch of five  ", round(whole.compute().item(), 6))
print("batches of 4 and 1 ", round(split.compute().item(), 6))
assert whole.compute() == 1
assert torch.isclose(split.compute(), torch.tensor(0.2))
PYTHON
