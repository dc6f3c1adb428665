"""Files that keep a state dict for each part of a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles import same, snapshot
from regraft import load_weights
from regraft.errors import CheckpointError


class Depth(nn.Module):
    """An encoder and a decoder whose layers have the same names and other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
        self.decoder = nn.Sequential(nn.Conv2d(32, 8, 1), nn.Conv2d(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Alike(nn.Module):
    """Both parts have the same names and shapes: only keys tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x).mean((2, 3)))


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = Alike(), nn.Sequential(nn.Linear(9, 9))


def assert_equal(trained: nn.Module, model: nn.Module) -> None:
    expected = trained.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def two(model: Any, ending: str = "") -> dict[str, Any]:
    return {f"encoder{ending}": model.encoder.state_dict(), f"decoder{ending}": model.decoder.state_dict()}


def wrapped(state: dict[str, Any]) -> dict[str, Any]:
    return {"module." + name: tensor for name, tensor in state.items()}


def adam(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


KEPT: dict[str, Callable[[Any], Any]] = {
    **{
        f"key{ending}": lambda model, ending=ending: {"epoch": 3, **two(model, ending)}
        for ending in ("", "_state_dict", "_state", "_sd", "_weights", ".state_dict")
    },
    "before the key": lambda model: {
        "model_encoder": model.encoder.state_dict(),
        "model_decoder": model.decoder.state_dict(),
    },
    "capitals": lambda model: {"Encoder": model.encoder.state_dict(), "Decoder": model.decoder.state_dict()},
    "in a dict": lambda model: {"net": two(model), "optimizer": {"state": {}, "param_groups": []}},
    "wrapped each": lambda model: {key: wrapped(state) for key, state in two(model).items()},
    "optimizers beside": lambda model: {
        **two(model),
        "opt_e": adam(model.encoder),
        "decoder_optimizer": adam(model.decoder),
    },
    "averages beside": lambda model: {**two(model), "ema": two(type(model)())},
    "parts of parts": lambda model: {
        "encoder.0": model.encoder[0].state_dict(),
        "encoder.1": model.encoder[1].state_dict(),
        "decoder": model.decoder.state_dict(),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [Depth, Alike])
@pytest.mark.parametrize("case", KEPT)
def test_load_weights_puts_parts_together(case: str, kind: type[nn.Module], tmp_path: Path) -> None:
    trained, model = kind(), kind()
    torch.save(KEPT[case](trained), tmp_path / "w.pth")
    expected = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    report = load_weights(model, tmp_path / "w.pth", strict=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert "put together from the entries" in report.headline()


PLACED: dict[str, tuple[type[nn.Module], Callable[[Any], Any]]] = {
    "backbone and head": (Classifier, lambda m: {"backbone": m.backbone.state_dict(), "head": m.fc.state_dict()}),
    "model and classifier": (Classifier, lambda m: {"model": m.backbone.state_dict(), "classifier": m.fc.state_dict()}),
    "own names": (Classifier, lambda m: {"backbone": m.backbone.state_dict(), "fc": m.fc.state_dict()}),
    "short names": (Depth, lambda m: {"enc": m.encoder.state_dict(), "dec": m.decoder.state_dict()}),
    "a list": (Depth, lambda m: {"models": [m.encoder.state_dict(), m.decoder.state_dict()]}),
    "two networks": (Gan, lambda m: {"netG": m.generator.state_dict(), "netD": m.discriminator.state_dict()}),
}


@pytest.mark.parametrize("case", PLACED)
def test_load_weights_places_parts_where_alone_they_fit(case: str, tmp_path: Path) -> None:
    kind, keep = PLACED[case]
    trained, model = kind(), kind()
    torch.save(keep(trained), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert_equal(trained, model)


def test_load_weights_takes_one_network_of_several(tmp_path: Path) -> None:
    trained, model = Gan(), Alike()
    torch.save(
        {"generator": trained.generator.state_dict(), "discriminator": trained.discriminator.state_dict()},
        tmp_path / "w.pth",
    )
    load_weights(model, tmp_path / "w.pth", strict=False)
    assert_equal(trained.generator, model)


TOLD_APART_BY_NOTHING: dict[str, Callable[[Any], Any]] = {
    "short names": lambda m: {"enc": m.encoder.state_dict(), "dec": m.decoder.state_dict()},
    "letters": lambda m: {"a": m.encoder.state_dict(), "b": m.decoder.state_dict()},
    "a list": lambda m: {"models": [m.encoder.state_dict(), m.decoder.state_dict()]},
    "student and teacher": lambda m: {"student": m.state_dict(), "teacher": Alike().state_dict()},
    "two in parts": lambda m: {"a": two(m), "b": two(Alike())},
}


@pytest.mark.parametrize("case", TOLD_APART_BY_NOTHING)
def test_load_weights_refuses_parts_that_nothing_tells_apart(case: str, tmp_path: Path) -> None:
    model = Alike()
    torch.save(TOLD_APART_BY_NOTHING[case](Alike()), tmp_path / "w.pth")
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"holds several .*entry=KEY"):
        load_weights(model, tmp_path / "w.pth")
    assert same(before, snapshot(model))


def test_load_weights_takes_the_parts_below_an_entry(tmp_path: Path) -> None:
    trained, model = Alike(), Alike()
    torch.save({"a": two(Alike()), "b": two(trained)}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", entry="b", strict=True)
    assert_equal(trained, model)


def test_load_weights_puts_parts_into_a_wrapped_model(tmp_path: Path) -> None:
    trained, model = Depth(), nn.DataParallel(Depth())
    torch.save(two(trained), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert_equal(trained, model.module)
