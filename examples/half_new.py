"""Half pretrained, half new: look, load weights, cut, append, freeze, train, and keep the result, in Python.

    python examples/half_new.py PHOTOS WEIGHTS OUT

`half_new.sh` takes the same steps on the command line, and ends with the same network. PHOTOS is a folder with a folder
for each of two classes, WEIGHTS a file for the network below, and OUT a folder for the results.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import regraft

photos, weights, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
name = f"py:{Path(__file__).parent.as_posix()}/mobilenet_v1.py:MobileNetV1"
torch.manual_seed(0)  # of the new layers' initial weights

# See the layers, and what they cost.
model = regraft.create_model(name, weights=weights, trust_code=True)
print(regraft.summary(model, depth=1))

# Delete the last layer, and put new ones in its place: two classes come out.
model = regraft.truncate(model, drop=1)
model = regraft.append(model, nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2))

# Freeze the first half, in the order of execution.
print(regraft.freeze(model, until="stage2"))
print(regraft.summary(model, depth=1))
regraft.save(model, out / "half_new.safetensors")

# Train what is not frozen, and read what came of it.
result = regraft.fit(model, photos, epochs=4, lr=1e-3, image_size=96, out=out / "run")
print(result.validation.headline())

# The file holds everything: layers, weights, class names, and what is frozen.
model = regraft.load(out / "run" / "model.safetensors", trust_code=True)
for prediction in regraft.predict(model, photos / "val")[:3]:
    print(prediction.path, prediction.label, f"{prediction.probability:.3f}")
