#!/usr/bin/env bash
# Lightning's EMAWeightAveraging changes the weights of layers that are frozen.
#
# Versions: lightning 2.6.6, torch 2.15.0, Python 3.11.
# Expected: the average of a weight that never changes is that weight: frozen layers are the same after fit, bit for
#     bit.
# Seen:
#     frozen weights changed  682 of 4096, by at most 4e-07
#     with torch's get_ema_multi_avg_fn alone  0 of 4096
#     The callback takes torch's get_ema_avg_fn, whose decay × w + (1 − decay) × w is rounded in every step.
# Why it matters: a frozen backbone is told apart by its digest, kept once for many heads, or left out of a small
#     checkpoint. After training with this callback none of it is equal any more.
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
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


torch.manual_seed(0)
model = Classifier()
before = model.backbone.weight.clone()
average = AveragedModel(model.backbone, multi_avg_fn=get_ema_multi_avg_fn(0.999))
batches = DataLoader(TensorDataset(torch.randn(200, 64), torch.arange(200) % 2), 10)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[EMAWeightAveraging()], **quiet)
for _ in range(60):
    average.update_parameters(model.backbone)
trainer.fit(model, batches)
changed = int((model.backbone.weight != before).sum())
most = (model.backbone.weight - before).abs().max().item()
others = int((average.module.weight != before).sum())
print(f"frozen weights changed  {changed} of {before.numel()}, by at most {most:.0e}")
print(f"with torch's get_ema_multi_avg_fn alone  {others} of {before.numel()}")
assert not model.backbone.weight.requires_grad
assert changed > 100
assert others == 0
PYTHON
