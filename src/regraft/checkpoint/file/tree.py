"""Nested plain data with tensors in it ↔ one safetensors file; no pickle.

The tensors are the file's tensors, under their paths in the data. The rest is a JSON document in the metadata, beside
a digest of all of it. What JSON does not have is an object with one key:

    {"tuple": […]}   {"dict": [[key, value], …]}   {"float": "inf"}   {"tensor": "name", "order": […]}

`order` is there for a tensor whose dimensions lie in another order in memory, as with `torch.channels_last`.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.file.atomic import atomic_write
from regraft.checkpoint.file.digest import bytes_of
from regraft.errors import CheckpointError, RunError

KEY, DIGEST = "regraft-tree", "regraft-tree-digest"

Tree = Any


def snapshot(tree: Tree) -> Tree:
    """Return a copy whose tensors are on the CPU and share memory with nothing; how they lie in memory is kept.

    >>> weight = torch.zeros(1)
    >>> snapshot({"weight": (weight, 1)})["weight"][0] is weight
    False
    """
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([snapshot(value) for value in tree])
    return tree


def write_tree(tree: Tree, path: Path) -> None:
    """Write dicts (with keys of str or int), lists, tuples, tensors, and plain values (None, bool, int, float, str).

    The file is written under another name, flushed to the disk and renamed.

    Args:
        tree: The data.
        path: Where to; its folder must exist.

    Raises:
        TypeError: Something is of another kind; the message says where. Nothing was written.
        RunError: The disk is full, or cannot be written. What was there before is still there.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    document = json.dumps(_encoded(tree, (), tensors), allow_nan=False)
    metadata = {KEY: document, DIGEST: _digest(document, tensors)}
    tensors = _apart(tensors)
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise RunError(f"cannot write '{path}': {error}. Free some space.") from error


def read_tree(path: Path) -> Tree:
    """Read what `write_tree` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: There is no such file, it was cut off, or anything in it has changed.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = metadata[KEY]
        if _digest(document, tensors) != metadata[DIGEST]:
            raise ValueError("its digest is another")
        return _decoded(json.loads(document), tensors)
    except Exception as error:  # of safetensors, JSON, or of data that is not what was written
        reason = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"'{path}' is damaged: {reason}. Use an older one, or start again.") from error


def _encoded(value: Tree, place: tuple[object, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value, place, tensors)
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"a key at '{_name(place)}' is a {type(key).__name__}, expected a str or an int")
        return {"dict": [[key, _encoded(part, (*place, key), tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_encoded(part, (*place, position), tensors) for position, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    raise TypeError(f"'{_name(place)}' is a {type(value).__name__}, which is no plain data")


def _encoded_tensor(tensor: torch.Tensor, place: tuple[object, ...], tensors: dict[str, torch.Tensor]) -> Any:
    name = _name(place)
    while name in tensors:
        name += "'"
    plain = tensor.detach().cpu()
    order = sorted(range(plain.ndim), key=lambda dimension: -plain.stride(dimension))
    if plain.is_contiguous() or not plain.permute(order).is_contiguous():
        tensors[name] = plain.contiguous()
        return {"tensor": name}
    tensors[name] = plain.permute(order)
    return {"tensor": name, "order": order}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy those that share memory with another, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decoded(part, tensors) for key, part in value["dict"]}
    if "tuple" in value:
        return tuple(_decoded(part, tensors) for part in value["tuple"])
    if "float" in value:
        return float(value["float"])
    tensor = tensors[value["tensor"]]
    if "order" in value:
        order: list[int] = value["order"]
        return tensor.permute([order.index(dimension) for dimension in range(len(order))])
    return tensor


def _digest(document: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.blake2b(document.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def _name(place: tuple[object, ...]) -> str:
    return "/".join(map(str, place)) or "value"
