"""Store nested plain data with tensors in one safetensors file, without pickle.

The tensors are stored under their paths in the data. The rest is a JSON document in the metadata, next to a digest of
document and tensors. Types that JSON does not have are objects with one key:

    {"tuple": […]}   {"dict": [[key, value], …]}   {"float": "inf"}   {"tensor": "name", "order": […]}

`order` is present if the dimensions of a tensor have another order in memory, as with `torch.channels_last`.
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
    """Return a copy whose tensors are on the CPU and share no memory; strides are preserved.

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

    The file is written under a temporary name, flushed to the disk and renamed.

    Args:
        tree: The data.
        path: The file to write; its folder must exist.

    Raises:
        TypeError: A value is of another type; the message says where. Nothing was written.
        RunError: The disk is full, or cannot be written. A previous file is unchanged.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    document = json.dumps(_encode(tree, (), tensors), allow_nan=False)
    metadata = {KEY: document, DIGEST: _digest(document, tensors)}
    tensors = _without_shared_memory(tensors)
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata)
    except Exception as error:  # safetensors raises its own error for a full disk
        raise RunError(f"cannot write '{path}': {error}. Free some space.") from error


def read_tree(path: Path) -> Tree:
    """Read a file of `write_tree`; tensors are on the CPU.

    Raises:
        CheckpointError: There is no such file, it is truncated, or its content has changed.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"no file '{path}' (looked from {Path.cwd()}).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied: they are views of the mapped file, which Windows neither replaces nor deletes while they live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        document = metadata[KEY]
        if _digest(document, tensors) != metadata[DIGEST]:
            raise ValueError("its digest is another")
        return _decode(json.loads(document), tensors)
    except Exception as error:  # safetensors, JSON and malformed data raise many types
        reason = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"'{path}' is damaged: {reason}. Use an older one, or start again.") from error


def _encode(value: Tree, place: tuple[object, ...], tensors: dict[str, torch.Tensor]) -> Any:
    """Convert a value at `place` to JSON data, and add its tensors to `tensors`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, place, tensors)
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"a key at '{_path_text(place)}' is a {type(key).__name__}, expected a str or an int")
        return {"dict": [[key, _encode(part, (*place, key), tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_encode(part, (*place, position), tensors) for position, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    raise TypeError(f"'{_path_text(place)}' is a {type(value).__name__}, which is no plain data")


def _encode_tensor(tensor: torch.Tensor, place: tuple[object, ...], tensors: dict[str, torch.Tensor]) -> Any:
    name = _path_text(place)
    while name in tensors:  # the keys 1 and "1" give the same path
        name += "'"
    plain = tensor.detach().cpu()
    # safetensors stores contiguous tensors only. Permuted to its order in memory, a channels_last tensor is contiguous.
    order = sorted(range(plain.ndim), key=lambda dimension: -plain.stride(dimension))
    if plain.is_contiguous() or not plain.permute(order).is_contiguous():
        tensors[name] = plain.contiguous()
        return {"tensor": name}
    tensors[name] = plain.permute(order)
    return {"tensor": name, "order": order}


def _without_shared_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory with an earlier one, which safetensors refuses."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decode(part, tensors) for key, part in value["dict"]}
    if "tuple" in value:
        return tuple(_decode(part, tensors) for part in value["tuple"])
    if "float" in value:
        return float(value["float"])
    tensor = tensors[value["tensor"]]
    if "order" in value:
        order: list[int] = value["order"]
        return tensor.permute([order.index(dimension) for dimension in range(len(order))])
    return tensor


def _digest(document: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(document.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _path_text(place: tuple[object, ...]) -> str:
    return "/".join(map(str, place)) or "value"
