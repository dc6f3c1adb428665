#!/usr/bin/env bash
# Half pretrained, half new: look, load weights, cut, append, freeze, train, and keep the result, on the command line.
#
#     examples/half_new.sh PHOTOS WEIGHTS OUT
#
# half_new.py takes the same steps in Python, and ends with the same network.
set -euo pipefail
photos=$1 weights=$2 out=$3
name="py:$(cd "$(dirname "$0")" && pwd)/mobilenet_v1.py:MobileNetV1"
mkdir -p "$out"

# See the layers, and what they cost.
regraft inspect "$name" --depth 1 --trust-code

# Delete the last layer, put new ones in its place, and freeze the first half, in the order of execution.
regraft surgery "$name" --weights "$weights" --truncate-drop 1 \
    --append 'Linear(256, 64)' 'ReLU()' 'Linear(64, 2)' --freeze-until stage2 \
    --out "$out/half_new.safetensors" --trust-code
regraft inspect "$out/half_new.safetensors" --depth 1 --trust-code

# Train what is not frozen, and read what came of it.
regraft train "$photos" --model "$out/half_new.safetensors" --epochs 4 --lr 1e-3 --image-size 96 \
    --out "$out/run" --trust-code

# The file holds everything: layers, weights, class names, and what is frozen.
regraft predict "$out/run/model.safetensors" "$photos/val" --trust-code
