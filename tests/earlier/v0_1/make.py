"""Write the files of this folder with the regraft that is installed: python make.py FOLDER (which is emptied)."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import regraft
from regraft.errors import Interrupted
from regraft.progress import Progress

OWN = (Path(__file__).parent / "own.py").read_text()
OPTIONS: dict[str, Any] = {"batch_size": 4, "lr": 0.01, "augment": "none", "device": "cpu"}


class StopsInEpoch3(Progress):
    """Sends Ctrl-C at the first step of the third epoch."""

    def track(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        for step, item in enumerate(items, 1):
            if description.startswith("epoch 3/") and step == 1:
                signal.raise_signal(signal.SIGINT)
            yield item


def write_photos() -> None:
    drawn = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dark", "light")):
            folder = Path("photos", part, name)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(drawn.normal(80 + 90 * label, 30, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def write_checkpoints() -> None:
    torch.manual_seed(0)
    model = regraft.create_model("py:own.py:Small", trust_code=True)
    regraft.freeze(model, until="bn1")
    regraft.save(model, "small.safetensors", metadata={"author": "a user"})
    regraft.save(regraft.replace_head(model, 3), "edited.safetensors")
    other = regraft.load("small.safetensors", trust_code=True)
    with torch.no_grad():
        other.get_parameter("fc.weight").add_(1)
    regraft.save(other, "delta.safetensors", base="small.safetensors")
    Path("plan.toml").write_text(regraft.plan_of(model).to_toml())
    images = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    names = ("small", "edited", "delta")
    loaded = {name: regraft.load(f"{name}.safetensors", trust_code=True).eval() for name in names}
    np.savez("outputs.npz", **{name: model(images).detach().numpy() for name, model in loaded.items()})


def write_runs() -> None:
    torch.set_num_threads(1)
    options = {**OPTIONS, "epochs": 4, "trust_code": True}
    regraft.fit("py:own.py:Small", "photos", out="whole", **options)
    try:
        regraft.fit("py:own.py:Small", "photos", out="run", progress=StopsInEpoch3(), **options)
    except Interrupted:
        regraft.fit(regraft.load("small.safetensors", trust_code=True), "photos", epochs=1, **OPTIONS)
    Path("torch.txt").write_text(torch.__version__)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    os.chdir(root)
    os.environ["REGRAFT_CACHE"] = str(root.resolve() / "cache")
    Path("own.py").write_text(OWN)
    write_photos()
    write_checkpoints()
    write_runs()
