"""Training as a loop written by hand does it, and networks and photos for that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import regraft
import tiny
from regraft.training.loop import main_output

STEPS: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.02,
    "schedule": "constant",
    "weight_decay": 0.0,
    "augment": "none",
    "batch_size": 1000,  # all photos at once, so that their order does not matter
    "epochs": 3,
}


def write_photos(root: Path, count: int, classes: int = 2, side: int = tiny.SIDE, measured: int = 8) -> Path:
    """Write noise of the size that networks take, whose brightness tells the classes apart but for some."""
    drawn = np.random.default_rng(5)
    for part, number_of_photos in (("train", count), ("val", measured)):
        for label in range(classes):
            folder = root / part / f"class{label:03}"
            folder.mkdir(parents=True)
            for number in range(number_of_photos):
                base = drawn.normal(100 + 60 * label / classes, 25)
                pixels = np.clip(base + drawn.normal(0, 40, (side, side, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return root


def read_photos(root: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read them with Pillow alone: images (N, 3, H, W), normalized, and classes (N,)."""
    images, targets = [], []
    for label, folder in enumerate(sorted((root / part).iterdir())):
        for file in sorted(folder.iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
            images.append((pixels.float() / 255 - 0.5) / 0.5)
            targets.append(label)
    return torch.stack(images), torch.tensor(targets)


def without_cuda() -> bool:
    return not torch.cuda.is_available()


HALF_SIZE = {"size": tiny.SIDE, "resize": tiny.SIDE, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(without_cuda(), reason="there is no CUDA device here")]
    ),
]


def cnn(*frozen: str) -> nn.Module:
    model = tiny.PlainCnn(num_classes=2)
    model.dropout.p = 0.0  # or the loop by hand would have to draw the same
    if frozen:
        regraft.freeze(model, *frozen)
    return model


def vit(*frozen: str) -> nn.Module:
    model = tiny.RootToken()
    model.block.self_attn.dropout = 0.0
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    model = regraft.replace_head(model, 2)
    if frozen:
        regraft.freeze(model, *frozen)
    return model


BUILT: dict[str, Callable[[], nn.Module]] = {
    "cnn, head": lambda: cnn("conv*", "bn*"),
    "cnn, half": lambda: cnn("conv1", "bn1"),
    "vit, head": lambda: vit("patches", "block", "norm", "params:cls_token", "params:positions"),
    "vit, half": lambda: vit("patches", "params:cls_token", "params:positions"),
}


def built(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return BUILT[name]().to(dtype)


def loop_by_hand(
    model: nn.Module,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    lr: float = STEPS["lr"],
) -> list[tuple[float, float]]:
    """Train as `STEPS` say, and return the loss before each step and the one measured after it."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)
    losses = []
    for _ in range(STEPS["epochs"]):
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(main_output(model(train[0])), train[1])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(
                (loss.item(), F.cross_entropy(main_output(model.eval()(validation[0])), validation[1]).item())
            )
    return losses


def assert_near(result: regraft.FitResult, expected: list[tuple[float, float]], tolerance: float) -> None:
    found = [(record.train_loss, record.validation.loss) for record in result.history]
    assert np.abs(np.array(found) - np.array(expected)).max() <= tolerance, (found, expected)
