"""Names of the functions that draw random numbers, and the states of the generators that they draw from."""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

RANDOM = frozenset(
    {
        "bernoulli", "bernoulli_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal", "normal_",
        "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm",
        "rrelu", "rrelu_", "uniform_", "gumbel_softmax", "cauchy_", "fractional_max_pool2d", "fractional_max_pool3d",
        "binomial", "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices",
    }
)  # fmt: skip
DROPPING = frozenset({"alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"})

State = tuple[bytes, Any, bytes, int]


def random_state() -> State:
    """Return the state of the global generators of torch (CPU), Python and NumPy as comparable values."""
    kind: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind[1].tobytes(), int(kind[2])


def generator_states(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return the states of the generators of each layer by name: its own, and those of its Python module's globals."""
    return {path: {name: _state(value) for name, value in _generators(layer)} for path, layer in layers.items()}


def _generators(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    kinds = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    for scope, values in (("self", vars(layer)), ("module", getattr(type(layer).forward, "__globals__", {}))):
        for name, value in values.items():
            if isinstance(value, kinds):
                yield f"{scope}.{name}", value


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.RandomState):
        return repr(generator.get_state(legacy=False))
    return repr(generator.bit_generator.state)
