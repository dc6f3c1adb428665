"""A run that is meant to be killed; in a module of its own, so that a process can be started with it."""

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import regraft
import tiny

STEP_S = 0.004  # more than a step of so small a network takes


def slow_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    time.sleep(STEP_S)
    return F.cross_entropy(outputs, targets)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return tiny.PlainCnn(num_classes=2)  # with dropout and batch norm


def run(photos: Path, out: Path, epochs: int) -> None:
    """Train with dropout, random versions of the photos and an optimizer with moments, and a state after each step."""
    torch.set_num_threads(1)
    regraft.fit(
        network(),
        photos,
        loss=slow_loss,
        out=str(out),
        resume=True,
        epochs=epochs,
        batch_size=4,
        lr=0.005,
        augment="standard",
        mixup=0.2,
        image_size=tiny.SIDE,
        cache=False,
        checkpoint_minutes=0,
    )
