"""The files that are mutated: a small one of every kind that can be read."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import regraft
from regraft.card import attach

OWN = ("net.safetensors", "edited.safetensors", "tied.safetensors")  # what `load` reads


def network() -> nn.Sequential:
    """Build the network into which weights are loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )


def write_all(folder: Path) -> dict[str, Path]:
    """Write one file of every kind, and return them by name."""
    model = network()
    regraft.freeze(model, "0")
    attach(model, classes=("a", "b", "c"), task="classification")
    regraft.save(model, folder / "net.safetensors", metadata={"note": [1, {"a": None}]})
    edited = regraft.create_model("timm/test_vit", weights="none", num_classes=4)
    regraft.save(regraft.append(edited, nn.ReLU(), nn.Linear(4, 2)), folder / "edited.safetensors")
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    regraft.save(tied, folder / "tied.safetensors")
    state = model.state_dict()
    save_file(state, folder / "plain.safetensors", {"format": "pt"})
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    steps = torch.optim.AdamW(model.parameters())
    wrapped = {"epoch": 3, "state_dict": {f"model.{name}": x for name, x in state.items()}, "optimizer_states": []}
    torch.save(
        {**wrapped, "optimizer_states": [steps.state_dict()], "hyper_parameters": {"lr": 0.1}}, folder / "w.ckpt"
    )
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    np.savez(folder / "arrays.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is an old way
        torch.jit.script(network()).save(str(folder / "script.pt"))
    return {path.name: path for path in sorted(folder.iterdir())}


def zipped(pickle: bytes, records: dict[str, bytes], *, folder: str = "archive") -> bytes:
    """Pack a pickle and storages as torch does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle)
        archive.writestr(f"{folder}/byteorder", "little")
        for key, record in records.items():
            archive.writestr(f"{folder}/data/{key}", record)
        archive.writestr(f"{folder}/version", "3\n")
    return buffer.getvalue()
