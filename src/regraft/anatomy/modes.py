"""Context managers that restore global random state, modes of layers and settings of torch."""

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


@contextlib.contextmanager
def preserved_randomness(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of torch (CPU and CUDA), Python and NumPy on exit, also after an exception.

    Args:
        seed: Seed of all of them inside the block; None: they continue.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                seed_all(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_all(seed: int) -> None:
    """Start the random generators of torch, Python and NumPy from `seed`."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # a hundred times as fast: `torch.manual_seed` records a stack trace for devices that are initialized later
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def unmoved_on_failure() -> Iterator[None]:
    """Restore the random state where the block raises; a block that succeeds advances it as usual."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        raise


@contextlib.contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Set the number of threads that torch uses within an operation, and restore it on exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_mode(model: Network, training: bool) -> Network:
    """Put a network into a mode, and return it, whatever its own `train` and `eval` return."""
    if training:
        model.train()
    else:
        model.eval()
    return model


@contextlib.contextmanager
def temporary_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` into a mode, and restore every module's own `.training` on exit."""
    before = [(module, module.training) for module in model.modules()]
    in_mode(model, training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def evaluation_mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Put `model` into evaluation mode, and restore every module's own `.training` on exit."""
    return temporary_mode(model, False)


@contextlib.contextmanager
def silenced(logger_name: str) -> Iterator[None]:
    """Disable one library's logger, and restore it on exit."""
    logger = logging.getLogger(logger_name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
