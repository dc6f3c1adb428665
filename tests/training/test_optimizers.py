"""Every optimizer of torch.optim and timm trains, or is refused in words before training."""

import copy
from typing import Any, cast

import pytest
import timm.optim
import torch
from torch import nn
from torch.utils.data import TensorDataset

import regraft
from regraft.errors import ConfigError

TORCHS = sorted(
    name.lower()
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
TIMMS = [f"timm/{name}" for name in cast(Any, timm.optim).list_optimizers()]
COMMON = ["timm/sgd", "timm/nesterov", "timm/muon", "timm/lamb", "timm/adahessian", "timm/fusedadam", "timm/lion"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in TIMMS if name not in COMMON]


@pytest.mark.parametrize("name", [*TORCHS, *COMMON, *SLOW])
def test_fit_trains_with_an_optimizer_or_refuses_it_before_training(name: str) -> None:
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    before = copy.deepcopy(model.state_dict())
    try:
        regraft.fit(model, (data, data), epochs=3, lr=1e-2, optimizer=name, batch_size=4)
    except ConfigError:
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert name not in ("timm/sgd", "timm/nesterov", "timm/muon", "adamw", "sgd")
    else:
        assert not torch.equal(model[3].weight, before["3.weight"])


@pytest.mark.parametrize("frozen", [(), ("0",)])
def test_build_optimizer_names_the_parameter_that_is_no_matrix_for_muon(frozen: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    regraft.freeze(model, *frozen) if frozen else None
    name = "2.bias" if frozen else "0.weight"
    with pytest.raises(ConfigError, match=rf"Muon trains matrices alone, and '{name}' has the shape .*Use timm/muon"):
        regraft.build_optimizer("muon", model, lr=0.1)
    assert regraft.build_optimizer("muon", nn.Linear(4, 2, bias=False), lr=0.1).param_groups[0]["lr"] == 0.1


def test_build_optimizer_gives_timms_optimizers_the_momentum_of_its_own_factory() -> None:
    model = nn.Linear(4, 2)
    for name in ("sgd", "sgdw", "momentum", "rmsproptf", "lars"):
        expected = timm.optim.create_optimizer_v2(model, name, lr=0.1).param_groups[0]["momentum"]
        assert regraft.build_optimizer(f"timm/{name}", model, lr=0.1).param_groups[0]["momentum"] == expected
        assert regraft.build_optimizer(f"timm/{name}", model, lr=0.1, momentum=0.5).param_groups[0]["momentum"] == 0.5
