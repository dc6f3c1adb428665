import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

import tiny
from regraft.anatomy.modes import evaluation_mode, preserved_randomness


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("seed", [None, 0, 2**40])
def test_preserved_randomness_puts_the_random_state_back(
    fails: bool, seed: int | None, random_state: Callable[[], tuple[object, ...]]
) -> None:
    before = random_state()
    try:
        with preserved_randomness(seed):
            torch.rand(3), random.random(), np.random.rand()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert random_state() == before


def test_preserved_randomness_draws_the_same_numbers_from_the_same_seed() -> None:
    drawn = []
    for _ in range(2):
        with preserved_randomness(7):
            drawn.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
        torch.rand(1)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_evaluation_mode_puts_mixed_modes_back(fails: bool) -> None:
    model = tiny.build("root-token")
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    before = [module.training for module in model.modules()]
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert [module.training for module in model.modules()] == before
