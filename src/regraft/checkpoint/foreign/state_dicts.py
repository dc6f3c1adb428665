"""Find the state dicts in the content of a file, and choose one."""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from regraft.errors import CheckpointError, nearest

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
TRAINING = re.compile(r"(^|_)(optim\w*|\w*sched\w*|scaler|loops|hyper_parameters|rng\w*|amp)(_|$)")  # keys of a run
DEPTH = 5
EXTRA_STATE = "_extra_state"  # its name in torch's state dicts

Tensors = dict[str, torch.Tensor]
Value = TypeVar("Value")


@dataclass(frozen=True)
class StateDict:
    """One state dict in a file.

    Attributes:
        path: The keys that lead to it, outermost first; empty where the file itself is a state dict.
        tensors: Its tensors by name.
        is_ordered: Whether the tensors are in the order of registration; safetensors sorts them by name.
        parts: Keys of the entries that it was joined from; empty for a state dict that the file holds as it is.
        sources: For a joined state dict, name → name in the file.
        extra: Name → plain data that `get_extra_state` of a layer returned.
    """

    path: tuple[str, ...]
    tensors: Tensors
    is_ordered: bool = True
    parts: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The keys with dots between them."""
        return ".".join(self.path)

    @property
    def is_average(self) -> bool:
        """Whether it is named like a running average of the weights."""
        return any("ema" in part.lower().split("_") or part.lower() in ("swa", "averaged") for part in self.path)


@dataclass(frozen=True)
class StateDicts:
    """All state dicts of a file.

    Attributes:
        path: The file.
        entries: The state dicts in it, at least one.
        left_out: Keys of other entries.
        notes: Remarks for the report, made while reading.
    """

    path: Path
    entries: tuple[StateDict, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def choices(self, wanted: str | None = None) -> list[StateDict]:
        """Return the state dict to load: the wanted one, or the one under a usual key.

        Raw weights are preferred to an average of them. Without a usual key, all remaining candidates are returned.

        Args:
            wanted: Key of an entry.

        Raises:
            CheckpointError: No entry has the wanted key, or several have.
        """
        if wanted is not None:
            return [self._named(wanted)]
        usual = self._usual(())
        if usual is not None:
            return [usual]
        return [entry for entry in self.entries if not entry.is_average] or list(self.entries)

    def _named(self, wanted: str) -> StateDict:
        exact = [entry for entry in self.entries if entry.key == wanted]
        matching = exact or [entry for entry in self.entries if f".{entry.key}.".find(f".{wanted}.") >= 0]
        if len(matching) != 1:
            problem = f"no entry '{wanted}'" if not matching else f"several entries '{wanted}'"
            known = [entry.key for entry in self.entries]
            listed = ", ".join(map(repr, known)) if any(known) else "none: it is one state dict"
            raise CheckpointError(
                f"'{self.path}' has {problem}. {nearest(wanted, known)} Its entries: {listed}.".replace("  ", " ")
            )
        return matching[0]

    def _usual(self, path: tuple[str, ...]) -> StateDict | None:
        """Return the state dict under the usual keys from `path` on; None if none or several are left."""
        below = [entry for entry in self.entries if entry.path[: len(path)] == path]
        for key in WRAPPERS:
            if any(entry.path[len(path) : len(path) + 1] == (key,) for entry in below):
                return self._usual((*path, key))
        here = next((entry for entry in below if entry.path == path), None)
        return here if here is not None else below[0] if len(below) == 1 else None


def state_dicts_of(content: Any, path: Path) -> StateDicts:
    """Find the state dicts in the content of a file.

    Raises:
        CheckpointError: It holds no state dict.
    """
    is_dict = isinstance(content, Mapping)
    entries = tuple(_find(content, (), set())) if is_dict else ()
    if not entries:
        description = f"a dict with {', '.join(map(repr, list(content)[:8]))}" if is_dict else reprlib.repr(content)
        raise CheckpointError(f"'{path}' holds no state dict, but {description[:200]}. Expected names with tensors.")
    tops = {entry.path[0] for entry in entries if entry.path}
    has_own = any(not entry.path for entry in entries)
    left_out = tuple(
        str(key)
        for key, value in content.items()
        if str(key) not in tops and not (has_own and isinstance(value, torch.Tensor))
    )
    return StateDicts(path, entries, left_out)


def is_extra_state(name: str) -> bool:
    """Return whether a name of a state dict belongs to the extra state of a layer."""
    return name.rpartition(".")[2] == EXTRA_STATE


def split_extra(tensors: dict[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Split a state dict, or what a file has for its names, into weights and extra states of layers."""
    extra = {name: tensor for name, tensor in tensors.items() if is_extra_state(name)}
    return {name: tensor for name, tensor in tensors.items() if name not in extra}, extra


def listed(entries: Sequence[StateDict]) -> str:
    """Describe entries in a message: their keys and numbers of tensors."""
    return ", ".join(f"'{entry.key}' ({len(entry.tensors)} tensors)" for entry in entries)


def _find(content: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]) -> Iterator[StateDict]:
    if len(path) > DEPTH or id(content) in seen or {"state", "param_groups"} <= content.keys():  # of an optimizer
        return
    seen.add(id(content))
    own = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    nested = [
        (key, value)
        for name, item in content.items()
        if not is_extra_state(str(name))
        for key, value in _mappings(str(name), item)
    ]
    below = [entry for key, value in nested if may_hold_weights(key) for entry in _find(value, (*path, key), seen)]
    if "callbacks" in path:
        below = [entry for entry in below if entry.is_average]
    numbers_beside = below and all(tensor.ndim == 0 for tensor in own.values())  # a best accuracy and the like
    if own and not numbers_beside and ("callbacks" not in path or StateDict(path, own).is_average):
        extra = {str(name): value for name, value in content.items() if is_extra_state(str(name))}
        yield StateDict(path, {name: own[name] for name in own if name not in extra}, extra=extra)
    yield from below


def _mappings(key: str, value: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """List the dicts under a key: the value itself, or those in a list."""
    if isinstance(value, Mapping):
        yield key, value
    elif isinstance(value, (list, tuple)):
        yield from ((f"{key}.{position}", item) for position, item in enumerate(value) if isinstance(item, Mapping))


def may_hold_weights(key: str) -> bool:
    """Return whether a key may hold weights; keys of a training run, such as `optimizer`, do not."""
    return not TRAINING.search(key.lower())
