"""Checkpoints that are changed byte by byte, and networks to save."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import tiny
from oracles import identical
from regraft import load, save


def shake(model: nn.Module) -> nn.Module:
    """Move every tensor of the state away from what a constructor sets, NaN and infinity included."""
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))
            else:
                tensor.add_(5)
        first = next(model.parameters())
        first.view(-1)[:3] = torch.tensor([float("nan"), float("-inf"), -0.0]).to(first.dtype)
    return model


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert identical(tensor, b[name]), name


def rewritten(path: Path, change: Callable[[dict[str, object]], None]) -> Path:
    """Change the header of a checkpoint by hand."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    whole = json.loads(raw[8 : 8 + length])
    header = json.loads(whole["__metadata__"]["regraft"])
    change(header)
    whole["__metadata__"]["regraft"] = json.dumps(header)
    text = json.dumps(whole).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


def flipped(path: Path) -> Path:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return path


def changed(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            model.state_dict(keep_vars=True)[name].add_(1)
    return model


def chain(folder: Path, length: int) -> tuple[Path, nn.Module]:
    path = save(tiny.build("sequential"), folder / "0.safetensors")
    model = load(path)
    for number in range(1, length + 1):
        changed(model, "7.bias" if number % 2 else "1.weight")
        path = save(model, folder / f"{number}.safetensors", base=path)
    return path, model
