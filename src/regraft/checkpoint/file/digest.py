"""Digests of tensors: equal digests mean bit-identical tensors."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = min(8, os.cpu_count() or 1)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 over a tensor's dtype, shape and bytes, as 64 hexadecimal digits.

    >>> tensor_digest(torch.zeros(2)) == tensor_digest(torch.zeros(2)) != tensor_digest(torch.zeros(1, 2))
    True
    """
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = started_digest(plain.dtype, plain.shape)
    digest.update(bytes_of(plain))
    return digest.hexdigest()


def started_digest(dtype: torch.dtype, shape: Iterable[int]) -> Any:
    """Return a SHA-256 object updated with a dtype and a shape; the caller adds the bytes."""
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the digest of each tensor, computed in parallel, sorted by name."""
    groups = balanced(list(tensors.items()), lambda item: item[1].nbytes)
    results = side_by_side(lambda group: [(name, tensor_digest(tensor)) for name, tensor in group], groups)
    by_name = {name: digest for group in results for name, digest in group}
    return {name: by_name[name] for name in sorted(by_name)}


def balanced(items: Sequence[Item], size: Callable[[Item], int]) -> list[list[Item]]:
    """Distribute items over the threads, so that each has about the same number of bytes to process."""
    groups: list[list[Item]] = [[] for _ in range(WORKERS)]
    loads = [0] * WORKERS
    for item in sorted(items, key=size, reverse=True):
        least = loads.index(min(loads))
        groups[least].append(item)
        loads[least] += size(item)
    return [group for group in groups if group]


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Process each item in a thread of its own: reading, copying and hashing release the interpreter lock."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))
