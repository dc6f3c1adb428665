"""The states of all random generators that a run uses, as plain data for a file."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from regraft.checkpoint.file.tree import Tree


def random_states(*data: object) -> Tree:
    """Return the states of the generators of torch (CPU and CUDA), Python, NumPy and the loaders in `data`."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, torch.tensor(words), gauss),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "loaders": [generator.get_state() for generator in _generators(data)],
    }


def set_random_states(states: Tree, *data: object) -> None:
    """Restore the states that `random_states` returned, of the global generators and of the loaders in `data`."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():  # a run may resume on another machine
        torch.cuda.set_rng_state_all(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    for generator, state in zip(_generators(data), states["loaders"], strict=False):
        generator.set_state(state)


def _generators(data: Iterable[object]) -> list[torch.Generator]:
    """List the generators of loaders, their samplers and their datasets, each once."""
    generators: list[torch.Generator] = []
    for loader in data:
        batch_sampler: Any = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
        owners += [loader.dataset] if isinstance(loader, DataLoader) else []
        for owner in owners:
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is known for known in generators):
                generators.append(generator)
    return generators
