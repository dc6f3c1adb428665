"""Saving what only carries another network, and tensors that have no bytes of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

import tiny
from oracles import identical
from regraft import create_model, diff, load, save
from regraft.card import attach, card_of
from regraft.errors import ArgumentError, InputError

CARRIERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_save_keeps_the_network_inside_of_a_wrapper_with_its_recipe(name: str, tmp_path: Path) -> None:
    model = create_model("squeezenet1_1", weights="none", num_classes=4)
    attach(model, classes=("a", "b", "c", "d"))
    file = save(CARRIERS[name](model), tmp_path / "model.safetensors")
    with safe_open(file, "pt") as stored:
        assert set(stored.keys()) == set(model.state_dict())
    again = load(file)
    assert type(again) is type(model)
    assert card_of(again).classes == ("a", "b", "c", "d")
    assert all(identical(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert diff(CARRIERS[name](model), file).identical


def test_save_takes_over_what_a_wrapper_learned_beside_the_recipe_of_the_network_inside(tmp_path: Path) -> None:
    model = create_model("squeezenet1_1", weights="none", num_classes=2)
    wrapper = attach(nn.DataParallel(model), classes=("left", "right"), task="classification")
    again = load(save(wrapper, tmp_path / "model.safetensors"))
    assert (card_of(again).classes, card_of(again).task) == (("left", "right"), "classification")
    assert card_of(model).classes is None


class Split(torch.Tensor):
    """A tensor that keeps its numbers in another, as torchao's quantized weights do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Split":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Split(args[0].inner)
        raise NotImplementedError(f"{func} of {cls.__name__}")


def meta() -> torch.Tensor:
    return torch.empty(2, 2, device="meta")


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 2)


WITHOUT_BYTES: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "wrapper subclass": (
        lambda: Split(torch.ones(2, 2)),
        "has no bytes to keep or to compare: it is a Split, which keeps its numbers in other tensors",
    ),
    "meta": (meta, "holds no values (it is on the meta device)"),
    "fake": (
        fake,
        "has no bytes to keep or to compare: it is a FakeTensor, which keeps its numbers in other tensors",
    ),
    "sparse": (
        lambda: torch.eye(2).to_sparse(),
        "has no bytes to keep or to compare: it is of layout sparse_coo. Use .to_dense()",
    ),
    "compressed": (
        lambda: torch.eye(2).to_sparse_csr(),
        "has no bytes to keep or to compare: it is of layout sparse_csr",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", WITHOUT_BYTES)
def test_save_and_diff_refuse_tensors_without_bytes_by_name_and_write_nothing(name: str, tmp_path: Path) -> None:
    make, problem = WITHOUT_BYTES[name]
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("odd", make())
    for attempt in (lambda: save(model, tmp_path / "model.safetensors"), lambda: diff(model, model)):
        with pytest.raises(InputError) as caught:
            attempt()
        assert "'0.odd'" in str(caught.value)
        assert problem in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_lazy_layers_in_words(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"'0\.weight' of model .*has no shape yet, as its layer is lazy"):
        save(nn.Sequential(nn.LazyLinear(2)), tmp_path / "model.safetensors")


@pytest.mark.filterwarnings("ignore:no recipe rebuilds")
@pytest.mark.parametrize("change", [torch.conj, lambda x: x.conj().imag, lambda x: x.mT, lambda x: x[:, ::2]])
def test_save_writes_the_values_that_a_view_shows(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    values = change(torch.randn(4, 4, dtype=torch.complex64))
    model.register_buffer("seen", values)
    with safe_open(save(model, tmp_path / "model.safetensors"), "pt") as stored:
        assert torch.equal(stored.get_tensor("seen"), values.resolve_conj().resolve_neg())


def test_diff_sees_the_network_inside_of_a_wrapper() -> None:
    model = tiny.build("plain")
    assert diff(nn.DataParallel(model), model).identical
