#!/usr/bin/env bash
# A LoRA adapter on the output projection of nn.MultiheadAttention does nothing until it is merged.
#
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.15.0, Python 3.11.
# Expected: an adapter that peft attaches takes part in the forward pass, gets gradients, and gives the same output
#     attached and merged.
# Seen:
#     attached: output changed False, gradient None
#     merged:   output changed True
#     nn.MultiheadAttention reads the weight of out_proj and never calls the layer, so the adapter around it is not called.
# Why it matters: out_proj is a usual target. The adapter is listed as trainable and saved, yet never learns; and an
#     adapter with values, trained elsewhere, changes the network when it is merged for export, after it was validated
#     without it.
set -euo pipefail
packages="torch==2.15.0 peft==0.21.2 transformers==5.23.0"
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
from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens)[0]


torch.manual_seed(0)
model, tokens = Net(), torch.randn(2, 5, 16)
plain = model(tokens).detach()
adapted = get_peft_model(model, LoraConfig(target_modules=["out_proj"], init_lora_weights=False))
attached = adapted(tokens)
trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
assert sorted(name.split(".")[-3] for name in trainable) == ["lora_A", "lora_B"]
if attached.requires_grad:
    attached.sum().backward()
gradients = {None if p.grad is None else float(p.grad.abs().sum()) for p in trainable.values()}
merged = adapted.merge_and_unload()(tokens)
is_changed = [not torch.allclose(output, plain, atol=1e-5) for output in (attached, merged)]
print(f"attached: output changed {is_changed[0]}, gradient {gradients.pop()}")
print(f"merged:   output changed {is_changed[1]}")
assert is_changed == [False, True]
PYTHON
