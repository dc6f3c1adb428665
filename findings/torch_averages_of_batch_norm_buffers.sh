#!/usr/bin/env bash
# AveragedModel with use_buffers=True and torch's own averaging function for many tensors fails on batch norms in the
# second update.
#
# Versions: torch 2.15.0, Python 3.11.
# Expected: torch.optim.swa_utils' own function averages what its own class hands to it.
# Seen:
#     no function                 updates True, batches counted 1 of 3
#     get_swa_multi_avg_fn        RuntimeError: Integer division with addcdiv is no longer supported
#     get_ema_multi_avg_fn        updates True, batches counted 1 of 3
#     num_batches_tracked is an integer; it either cannot be divided, or stays at its first value.
# Why it matters: averaging weights over a fine-tuning needs the statistics of batch norms averaged as well, and these
#     two options are what the documentation offers. With momentum=None the statistics of the average then start
#     almost anew when it is trained further, as only one batch was counted.
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn


def outcome(**options):
    model = nn.BatchNorm1d(4)
    average = AveragedModel(model, use_buffers=True, **options)
    try:
        for _ in range(3):
            model(torch.randn(8, 4))
            average.update_parameters(model)
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split(',')[0]}"
    return f"updates True, batches counted {average.module.num_batches_tracked} of {model.num_batches_tracked}"


outcomes = {
    "no function": outcome(),
    "get_swa_multi_avg_fn": outcome(multi_avg_fn=get_swa_multi_avg_fn()),
    "get_ema_multi_avg_fn": outcome(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
}
for name, text in outcomes.items():
    print(name.ljust(27), text)
assert outcomes["no function"] == outcomes["get_ema_multi_avg_fn"] == "updates True, batches counted 1 of 3"
assert outcomes["get_swa_multi_avg_fn"].startswith("RuntimeError: Integer division")
PYTHON
