#!/usr/bin/env bash
# Lightning trains a network of transformers without its dropout.
#
# Versions: lightning 2.6.6, transformers 5.23.0, torch 2.15.0, Python 3.11.
# Expected: Trainer.fit puts the module into training mode, so dropout of a loaded network is active.
# Seen:
#     the module, the network inside  [(True, False), (True, False)]
#     from_pretrained returns the network in evaluation mode, and Lightning keeps the mode of each module as it finds it.
# Why it matters: fine-tuning runs without any dropout, and batch norms keep their statistics, unless one writes
#     self.net.train(). The same two packages behave otherwise with transformers' own Trainer, and with a network that
#     was built from a configuration.
set -euo pipefail
packages="torch==2.15.0 lightning==2.6.6 transformers==5.23.0"
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

import logging
import warnings

import lightning as L
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()
config = transformers.ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, hidden_dropout_prob=0.5
)
transformers.ViTForImageClassification(config).save_pretrained("saved")
modes = []


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = transformers.ViTForImageClassification.from_pretrained("saved")

    def training_step(self, batch, _):
        modes.append((self.training, self.net.training))
        return nn.functional.cross_entropy(self.net(batch[0]).logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


batches = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])), 2)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
L.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Classifier(), batches)
print("the module, the network inside ", modes)
assert modes == [(True, False)] * 2
PYTHON
