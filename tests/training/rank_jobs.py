"""Runs that one process and two ranks carry out alike; started by torchrun, this file is a rank."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.data import TensorDataset

import regraft
import tiny
from regraft.cli.app import app
from regraft.errors import Interrupted, RankError, RegraftError
from regraft.frontier.cache.store import Store
from regraft.training.features import extract
from training.factories import StopsAt, dataset

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
COMMON: dict[str, Any] = {"epochs": 3, "batch_size": 10, "seed": 3, "optimizer": "sgd", "lr": 0.02, "progress": False}
STOPPED = ("stopped by one", "stopped by two")


def cnn(*frozen: str) -> nn.Module:
    """Build a network without dropout, whose weights differ from rank to rank: those of rank 0 count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 + RANK)
        model = tiny.PlainCnn(num_classes=2)
    model.dropout.p = 0.0
    regraft.freeze(model, "bn*", *frozen)  # a live batch norm sees the rows of its rank alone
    return model


def datasets(count: int) -> tuple[TensorDataset, TensorDataset]:
    train, validation = (TensorDataset(x, y % 2) for x, y in (dataset(count).tensors, dataset(9, 1).tensors))
    return train, validation


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss that is no plain mean over samples."""
    return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 3.0]))


def short_of_memory(model: nn.Module) -> nn.Module:
    """Let rank 1 have memory for three rows alone."""

    def refuse(layer: nn.Module, inputs: Any) -> None:
        if RANK == 1 and layer.training and len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("as a GPU says it")

    model.register_forward_pre_hook(refuse)
    return model


JOBS: dict[str, Callable[[Path], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "head": lambda f: (cnn("conv*"), f / "photos", {"optimizer": "adamw", "lr": None}),
    "half": lambda f: (cnn("conv1"), f / "photos", {}),
    "caches apart": lambda f: (cnn("conv1"), f / "photos", {}),
    "views": lambda f: (cnn("conv1"), f / "photos", {"augment": "standard", "views": 2}),
    "photos": lambda f: (cnn(), f / "photos", {"augment": "standard"}),
    "mixup": lambda f: (cnn(), f / "photos", {"mixup": 0.4}),
    "weighted": lambda f: (
        short_of_memory(cnn()),
        datasets(13),
        {"loss": weighted},
    ),  # of three rows, all are those of rank 0
    "unfreezing": lambda f: (cnn(), f / "photos", {"unfreeze": "head:1,conv2:1,conv1:1"}),
    **dict.fromkeys(STOPPED, lambda f: (cnn("conv1"), f / "photos", {})),
}


def carry_out(name: str, folder: Path, cache: Path, **more: Any) -> regraft.FitResult:
    os.environ["REGRAFT_CACHE"] = str(cache)
    model, data, options = JOBS[name](folder)
    result = regraft.fit(model, data, **{**COMMON, **options, **more})
    if RANK == 0:
        losses = [(record.train_loss, record.validation.loss) for record in result.history]
        was_found = result.computed_once.was_found if result.computed_once is not None else None
        kept = (result.model.state_dict(), result.outputs, losses, result.validation.to_dict(), was_found)
        torch.save(kept, folder / f"{name} {SIZE}.pt")
    return result


def stop(name: str, folder: Path, cache: Path) -> None:
    """Stop a run in its second epoch, by a signal to rank 0 alone; a shell's background jobs ignore SIGINT."""
    with contextlib.suppress(Interrupted):
        carry_out(name, folder, cache, out=str(folder / name), progress=StopsAt(2, 3, signal.SIGTERM))


def killing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss that kills rank 1 at its twentieth call."""
    killing.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
    if RANK == 1 and killing.calls == 20:  # pyright: ignore[reportFunctionMemberAccess]
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(outputs, targets)


def messages(folder: Path) -> None:
    """Note what two ranks say where something is wrong, and what the command prints."""
    answers = {}

    def fit(name: str, model: nn.Module, data: Any) -> None:
        try:
            regraft.fit(model, data, **COMMON)
        except RegraftError as error:
            answers[name] = str(error), error.rank, error.is_told

    fit("files", cnn(), folder / ("photos" if RANK == 0 else "other photos"))
    batches = [(part.tensors[0][:6], part.tensors[1][:6]) for part in datasets(12)]
    fit("batches", cnn(), ([batches[0]] * (3 - RANK), [batches[1]]))
    with mock.patch.object(extract, "MEMORY_BYTES", 0), mock.patch.object(Store, "has_room", return_value=False):
        os.environ["REGRAFT_CACHE"] = str(folder / "empty cache")
        fit("room", cnn("conv1"), folder / "photos")

    model = ("--model", f"py:{tiny.__file__}:PlainCnn", "--weights", "none", "--trust-code", "--epochs", "2")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        app(["train", str(folder / "photos"), *model, "--out", str(folder / "run"), "--json"], standalone_mode=False)
    answers["printed"] = out.getvalue(), err.getvalue()
    (folder / f"answers {RANK}.json").write_text(json.dumps(answers))


def rank(folder: Path) -> None:
    for name in JOBS:
        caches = {"half": "cache of both", "caches apart": f"cache apart {RANK}"}
        cache = folder / caches.get(name, "cache of 2")
        if name == STOPPED[0]:
            carry_out(name, folder, cache, out=str(folder / name), resume=True)
        elif name == STOPPED[1]:
            stop(name, folder, cache)
        else:
            carry_out(name, folder, cache)
    messages(folder)
    killing.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    try:
        data = datasets(23)
        regraft.fit(
            cnn(), data, loss=killing, **{**COMMON, "epochs": 12}, out=str(folder / "killed"), checkpoint_minutes=0
        )
    except RankError as error:
        (folder / "killed.txt").write_text(str(error))
        raise


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
