#!/usr/bin/env bash
# from_pretrained gives a new head the 16-bit numbers of the file, and so the whole network is trained in them.
#
# Versions: transformers 5.23.0, torch 2.15.0, Python 3.11.
# Expected: a network is loaded in float32, torch's default, as it was up to transformers 4; a head that is not in the
#     file is new, and float32 at any rate.
# Seen:
#     a network from its configuration          torch.float32
#     loaded from a file of float16             torch.float16
#     its new head                              torch.float16
#     scale of a norm after a step of 1e-4      1.0
# Why it matters: files on hubs are often kept in 16 bits to be small. A step of 1e-4 is lost in float16 next to 1.0,
#     so layers do not learn, and gradients underflow; before version 5 the same code trained in float32.
#     dtype=torch.float32 mends it.
set -euo pipefail
packages="torch==2.15.0 transformers==5.23.0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet $packages
fi
cd "$folder"
export HF_HUB_OFFLINE=1
"$python" - $packages <<'PYTHON'
import sys
from importlib.metadata import version

pins = dict(pin.split("==") for pin in sys.argv[1:])
assert all(version(name).partition("+")[0] == pin for name, pin in pins.items()), "other versions than those named above"

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
config = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, num_labels=2
)
fresh = transformers.ViTForImageClassification(config)
print("a network from its configuration         ", fresh.dtype)
assert fresh.dtype == torch.float32
fresh.half().save_pretrained("saved")
loaded = transformers.ViTForImageClassification.from_pretrained("saved", num_labels=7, ignore_mismatched_sizes=True)
scale = loaded.vit.layernorm.weight
with torch.no_grad():
    scale -= 1e-4 * torch.ones_like(scale)
print("loaded from a file of float16            ", loaded.dtype)
print("its new head                             ", loaded.classifier.weight.dtype)
print("scale of a norm after a step of 1e-4     ", scale[0].item())
assert loaded.classifier.weight.shape == (7, 16)
assert loaded.dtype == loaded.classifier.weight.dtype == torch.float16
assert scale[0].item() == 1.0
PYTHON
