#!/usr/bin/env bash
# Lightning's BackboneFinetuning thaws the batch norms that the user has frozen.
#
# Versions: lightning 2.6.6, torch 2.15.0, Python 3.11.
# Expected: until the epoch in which it unfreezes the backbone, the callback leaves it frozen as a whole.
# Seen:
#     weight trainable False, changed False
#     scale trainable True, changed True
#     running mean changed True
#     Its default train_bn=True sets requires_grad of every batch norm, also where that was off before.
# Why it matters: scale and shift of a pretrained network learn from the first step of a head that knows nothing yet,
#     with a rate meant for the head, and the statistics follow the new photos. It takes train_bn=False to keep what
#     was frozen.
set -euo pipefail
packages="torch==2.15.0 lightning==2.6.6"
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

import logging
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2)
        self.backbone.requires_grad_(False)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


torch.manual_seed(0)
model = Classifier()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
batches = DataLoader(TensorDataset(torch.randn(16, 4) + 3, torch.arange(16) % 2), 4)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
callback = BackboneFinetuning(unfreeze_backbone_at_epoch=10)
L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(model, batches)
changed = {name: not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()}
linear, norm = model.backbone
print(f"weight trainable {linear.weight.requires_grad}, changed {changed['backbone.0.weight']}")
print(f"scale trainable {norm.weight.requires_grad}, changed {changed['backbone.1.weight']}")
print("running mean changed", changed["backbone.1.running_mean"])
assert not linear.weight.requires_grad
assert norm.weight.requires_grad
assert [changed[f"backbone.{key}"] for key in ("0.weight", "1.weight", "1.running_mean")] == [False, True, True]
PYTHON
