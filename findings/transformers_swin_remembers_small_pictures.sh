#!/usr/bin/env bash
# A Swin of transformers that has seen one small picture gives other outputs for all larger ones from then on.
#
# Versions: transformers 5.23.0, torch 2.15.0, Python 3.11, Linux.
# Expected: in evaluation mode and without gradients, a forward changes nothing; the same picture gives the same output
#     whatever was shown in between. torchvision's Swin does so.
# Seen:
#     transformers  the same picture again: equal; after a smaller one: not equal, shift of the windows 3 -> 0
#     torchvision   the same picture again: equal; after a smaller one: equal
#     Where a stage sees no more tokens a side than a window has, its layers set their own window and shift, and keep them.
# Why it matters: a server that takes pictures of any size, or a test at a low resolution before the real run, changes
#     the network for good: no tensor of its state dict differs, no warning is given, and the saved and loaded network
#     is another one than that in memory.
set -euo pipefail
packages="torch==2.15.0 torchvision==0.29.2 transformers==5.23.0"
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

warnings.simplefilter("error")
import torch
from torchvision.models.swin_transformer import SwinTransformer
from transformers import SwinConfig, SwinModel

sizes = {"patch_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2]}
of_transformers = SwinModel(SwinConfig(image_size=64, window_size=7, **sizes)).eval()
of_torchvision = SwinTransformer([4, 4], 12, [2], [2], [7, 7]).eval()
large, small = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 28, 28)  # 16 and 7 tokens a side


def compare(run):
    first, again = run(large), run(large)
    run(small)
    return torch.equal(first, again), torch.equal(first, run(large))


block = of_transformers.encoder.layers[0].blocks[1]
tensors = {name: value.clone() for name, value in of_transformers.state_dict().items()}
shift = block.shift_size
with torch.no_grad():
    seen = {
        "transformers": compare(lambda images: of_transformers(images, interpolate_pos_encoding=True).last_hidden_state),
        "torchvision": compare(of_torchvision),
    }
words = {True: "equal", False: "not equal"}
for library, (again, after) in seen.items():
    moved = f", shift of the windows {shift} -> {int(block.shift_size)}" if library == "transformers" else ""
    print(f"{library:13} the same picture again: {words[again]}; after a smaller one: {words[after]}{moved}")
assert all(torch.equal(value, tensors[name]) for name, value in of_transformers.state_dict().items())
assert seen == {"transformers": (True, False), "torchvision": (True, True)}
assert (shift, int(block.shift_size)) == (3, 0)
PYTHON
