"""Read what people really have: wrapped, prefixed and pickled state dicts, without running anything that is in them."""

import os
import pickle
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.checkpoint.format import is_safetensors, read_header
from regraft.checkpoint.limits import check_container
from regraft.checkpoint.pickles import made_plain
from regraft.errors import CheckpointError

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "encoder.", "net.", "network.", "base_model.")
FOREIGN_NAME = re.compile(r"(?:GLOBAL|function|class|type) <?([\w.]+)")  # in what torch's unpickler complains about
PREFIX_DEPTH = 3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What of a file went into a model; `str()` says it in a line.

    Attributes:
        path: The file.
        loaded: Names of the tensors that were loaded, as the model calls them.
        missing: Names that the model has and the file lacks; those keep their values.
        unexpected: Names that the file has and the model lacks.
        mismatched: (name, shape in the file, shape in the model); those keep their values.
        notes: What was unwrapped or stripped on the way, and what probably explains the differences.
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} tensors loaded from '{self.path}'"
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                counts += f", {len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for name, theirs, ours in self.mismatched:
            counts += f", '{name}' is {theirs} in the file and {ours} in the model"
        return "; ".join([counts, *self.notes])


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = False,
) -> LoadReport:
    """Load the weights in a file into `model`, in place: safetensors, or anything that `torch.save` wrote.

    Pickled files go through torch's weights-only unpickler: nothing in them is executed. Wrapped state dicts
    (`{"state_dict": …}` and the like) are unwrapped, prefixes that wrappers leave (`module.`, `_orig_mod.`, …) are
    stripped or added where that fits more names. Everything is checked before the first tensor changes.

    Args:
        model: Any module.
        path: The file.
        rename: Regular expressions and what each is replaced by, applied to the names in the file.
        strict: Whether anything missing, unexpected or mismatched is an error.

    Returns:
        What was loaded and what was not. Missing and mismatched tensors keep their values.

    Raises:
        CheckpointError: The file cannot be read without running code, nothing in it fits, or `strict` and not
            everything does. Nothing was changed.
    """
    source = Path(path)
    tensors, notes = read_tensors(source)
    for pattern, replacement in (rename or {}).items():
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    slots: Tensors = model.state_dict(keep_vars=True)
    tensors, prefix_note = _fit_prefix(tensors, slots)
    fitting = {name for name, tensor in tensors.items() if name in slots and slots[name].shape == tensor.shape}
    mismatched = [
        (name, tuple(tensor.shape), tuple(slots[name].shape))
        for name, tensor in tensors.items()
        if name in slots and name not in fitting
    ]
    report = LoadReport(
        path=str(source),
        loaded=tuple(name for name in slots if name in fitting),
        missing=tuple(name for name in slots if name not in tensors and not name.endswith("num_batches_tracked")),
        unexpected=tuple(name for name in tensors if name not in slots),
        mismatched=tuple(mismatched),
        notes=(*notes, *prefix_note),
    )
    if not fitting:
        raise CheckpointError(
            f"nothing in '{source}' fits {type(model).__name__}: the file has {_first(tensors)}, the model "
            f"{_first(slots)}. Give the architecture that the file was trained with, or rename={{…}}. "
            "Nothing was changed."
        )
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(f"'{source}' does not fit {type(model).__name__} in all: {report}. Nothing was changed.")
    with torch.no_grad():
        for name in report.loaded:
            slots[name].copy_(tensors[name])
    return report


def read_tensors(path: Path) -> tuple[Tensors, list[str]]:
    """Read the tensors of a file under their names, on the CPU, and notes about what was unwrapped.

    Raises:
        CheckpointError: The file does not exist, or cannot be read without running code.
    """
    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of a file with weights.")
    check_container(path)
    if is_safetensors(path):
        return _read_safetensors(path), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the file's format
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (foreign := FOREIGN_NAME.search(str(error))):
            raise CheckpointError(
                f"'{path}' holds more than tensors ({foreign[1]}), and reading it would run code from it. "
                "On a machine where you trust the file, load it yourself and write torch.save(model.state_dict(), …)."
            ) from error
        reason = "no pickle that holds tensors" if isinstance(error, pickle.UnpicklingError) else str(error)
        raise CheckpointError(
            f"'{path}' cannot be read as weights: {type(error).__name__}: {reason.partition(chr(10))[0][:200]}. "
            "Expected a safetensors file or one that torch.save wrote."
        ) from error
    return _unwrap(made_plain(path, content, path.stat().st_size), path)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}. Get or make it again.") from error
    header = read_header(path)
    for alias, name in (header.shared if header else {}).items():
        if name not in tensors:
            raise CheckpointError(f"'{path}' is damaged: '{alias}' is stored as '{name}', which it lacks.")
        tensors[alias] = tensors[name]
    return tensors


def _unwrap(content: Any, path: Path) -> tuple[Tensors, list[str]]:
    notes = []
    while isinstance(content, Mapping):
        inner = next(
            (key for key in WRAPPERS if isinstance(content.get(key), Mapping) and _tensor_dict(content[key])), None
        )
        if inner is None:
            break
        notes.append(f"taken from the entry '{inner}'")
        content = content[inner]
    tensors = _tensor_dict(content) if isinstance(content, Mapping) else {}
    if not tensors:
        found = (
            f"a dict with {', '.join(map(repr, list(content)[:8]))}"
            if isinstance(content, Mapping)
            else reprlib.repr(content)
        )
        raise CheckpointError(f"'{path}' holds no state dict, but {found[:200]}. Expected names with tensors.")
    return tensors, notes


def _tensor_dict(content: Mapping[Any, Any]) -> Tensors:
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    nested = any(isinstance(content.get(key), Mapping) for key in WRAPPERS)
    return tensors or ({"": torch.empty(0)} if nested else {})


def _fit_prefix(tensors: Tensors, slots: Tensors) -> tuple[Tensors, list[str]]:
    """Strip or add the few prefixes that make the most names fit; none where that makes no more fit."""
    best: tuple[Tensors, list[str]] = (tensors, [])
    most = _count_fitting(tensors, slots)
    tried = [best]
    for _ in range(PREFIX_DEPTH):
        tried = [(names, [*notes, note]) for before, notes in tried for names, note in _other_prefixes(before, slots)]
        for candidate in tried:
            if (fitting := _count_fitting(candidate[0], slots)) > most:
                best, most = candidate, fitting
    return best


def _other_prefixes(tensors: Tensors, slots: Tensors) -> Iterator[tuple[Tensors, str]]:
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            if len(stripped) == len(tensors):
                yield stripped, f"prefix '{prefix}' stripped"
        elif any(name.startswith(prefix) for name in slots):
            yield {prefix + name: tensor for name, tensor in tensors.items()}, f"prefix '{prefix}' added"


def _count_fitting(tensors: Tensors, slots: Tensors) -> int:
    return sum(name in slots and slots[name].shape == tensor.shape for name, tensor in tensors.items())


def _first(tensors: Tensors) -> str:
    return ", ".join(f"'{name}' {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:2])
