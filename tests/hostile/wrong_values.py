"""Values of every kind that somebody may pass by mistake, each made anew for each call."""

import decimal
import fractions
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scene import write_photo


class Odd(nn.Module):
    """Fails in its forward with an error of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("odd")


class Empty(nn.Module):
    """Has no forward at all."""


def nested() -> list[Any]:
    """Return a list that holds itself."""
    one: list[Any] = []
    one.append(one)
    return one


def generator() -> Any:
    return (item for item in ("0", "2"))


def bad_dataset() -> Any:
    data = TensorDataset(torch.zeros(4, 4), torch.zeros(4))
    return DataLoader(data, batch_size=2, generator=torch.Generator())  # else looking at it draws from torch's own


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.ReLU())


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1)


PLAIN: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "7": lambda: 7,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "0.5": lambda: 0.5,
    "-1.5": lambda: -1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "1j": lambda: 1j,
    "Decimal": lambda: decimal.Decimal("0.1"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "Ellipsis": lambda: ...,
    "object": object,
    "slice": lambda: slice(0, 2),
    "range": lambda: range(3),
    "lambda": lambda: lambda *a, **k: None,
    "type": lambda: int,
    "exception": lambda: ValueError("no"),
    "io": lambda: io.BytesIO(b"abc"),
}
TEXTS: dict[str, Callable[[], Any]] = {
    "''": lambda: "",
    "' '": lambda: " ",
    "'0'": lambda: "0",
    "'9.weight'": lambda: "9.weight",
    "'0.weight'": lambda: "0.weight",
    "'.'": lambda: ".",
    "'..'": lambda: "..",
    "'*'": lambda: "*",
    "'['": lambda: "[",
    "'re:('": lambda: "re:(",
    "'type:'": lambda: "type:",
    "'children[9]'": lambda: "children[9]",
    "'params:'": lambda: "params:",
    "'head:3'": lambda: "head:3",
    "'1e-3'": lambda: "1e-3",
    "'nul'": lambda: "a\0b",
    "'surrogate'": lambda: "\udcff",
    "'long'": lambda: "x" * 5000,
    "'auto'": lambda: "auto",
    "'cuda:99'": lambda: "cuda:99",
    "'adam'": lambda: "adam",
    "'class'": lambda: "class",
    "'py:'": lambda: "py:",
    "'py:nothing:Net'": lambda: "py:nothing:Net",
    "'timm/'": lambda: "timm/",
    "'resnet18'": lambda: "resnet18",
    "'ReLU()'": lambda: "ReLU()",
    "'Linear('": lambda: "Linear(",
    "b'0'": lambda: b"0",
    "bytearray": lambda: bytearray(b"0"),
}
CONTAINERS: dict[str, Callable[[], Any]] = {
    "[]": list,
    "()": tuple,
    "{}": dict,
    "set": lambda: {"0"},
    "['0']": lambda: ["0"],
    "('0',)": lambda: ("0",),
    "('0', 1)": lambda: ("0", 1),
    "('0', '0', '0')": lambda: ("0", "0", "0"),
    "[1, 2]": lambda: [1, 2],
    "[None]": lambda: [None],
    "[-1, 4]": lambda: [-1, 4],
    "(1, 'x')": lambda: (1, "x"),
    "[0.5]": lambda: [0.5],
    "[[1, 4]]": lambda: [[1, 4]],
    "{'a': 1}": lambda: {"a": 1},
    "{1: 'a'}": lambda: {1: "a"},
    "{'0': '2'}": lambda: {"0": "2"},
    "{'(': 'x'}": lambda: {"(": "x"},
    "{0: 9}": lambda: {0: 9},
    "{'x': None}": lambda: {"x": None},
    "nested": nested,
    "generator": generator,
    "[tensor]": lambda: [torch.zeros(2, 4)],
    "(tensor, tensor)": lambda: (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)),
    "{'x': tensor}": lambda: {"x": torch.zeros(2, 4)},
    "([], [])": lambda: ([], []),
    "state dict": lambda: nn.Linear(4, 2).state_dict(),
    "parameters": lambda: nn.Linear(4, 2).parameters(),
    "[parameter]": lambda: list(nn.Linear(4, 2).parameters()),
}
ARRAYS: dict[str, Callable[[], Any]] = {
    "np.float64": lambda: np.float64(0.1),
    "np.int64": lambda: np.int64(3),
    "np.nan": lambda: np.float32("nan"),
    "np.str_": lambda: np.str_("0"),
    "array int": lambda: np.array([1, 2]),
    "array float": lambda: np.zeros((2, 4), np.float32),
    "array object": lambda: np.array([None, "a"], dtype=object),
    "array 0-d": lambda: np.array(0.1),
    "tensor": lambda: torch.zeros(2, 4),
    "tensor int": lambda: torch.zeros(2, 4, dtype=torch.int64),
    "tensor bool": lambda: torch.zeros(2, 4, dtype=torch.bool),
    "tensor double": lambda: torch.zeros(2, 4, dtype=torch.float64),
    "tensor half": lambda: torch.zeros(2, 4, dtype=torch.float16),
    "tensor complex": lambda: torch.zeros(2, 4, dtype=torch.complex64),
    "tensor scalar": lambda: torch.tensor(0.1),
    "tensor vector": lambda: torch.zeros(4),
    "tensor no rows": lambda: torch.zeros(0, 4),
    "tensor wide": lambda: torch.zeros(2, 5),
    "tensor 3-d": lambda: torch.zeros(2, 3, 4),
    "tensor image": lambda: torch.zeros(2, 3, 8, 8),
    "tensor 6-d": lambda: torch.zeros(1, 1, 1, 1, 1, 4),
    "tensor meta": lambda: torch.zeros(2, 4, device="meta"),
    "tensor sparse": lambda: torch.eye(4).to_sparse(),
    "tensor nan": lambda: torch.full((2, 4), float("nan")),
    "tensor graph": lambda: torch.zeros(2, 4, requires_grad=True) * 2,
    "parameter": lambda: nn.Parameter(torch.zeros(4)),
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "device meta": lambda: torch.device("meta"),
}
NETWORKS: dict[str, Callable[[], Any]] = {
    "function resnet18": lambda: torchvision.models.resnet18,
    "class Linear": lambda: nn.Linear,
    "class SGD": lambda: torch.optim.SGD,
    "weights enum": lambda: torchvision.models.ResNet18_Weights.DEFAULT,
    "Linear": lambda: nn.Linear(4, 2),
    "Linear wide": lambda: nn.Linear(99, 2),
    "Identity": nn.Identity,
    "Sequential()": nn.Sequential,
    "ModuleList": lambda: nn.ModuleList([nn.Linear(4, 2)]),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(4, 2)}),
    "Odd": Odd,
    "Empty": Empty,
    "ReLU": nn.ReLU,
    "lazy": lazy,
    "meta": meta,
    "LSTM": lambda: nn.LSTM(4, 2),
    "Embedding": lambda: nn.Embedding(3, 2),
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "optimizer": optimizer,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(optimizer(), 1),
    "dataset": lambda: TensorDataset(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)),
    "loader": bad_dataset,
    "(loader, loader)": lambda: (bad_dataset(), bad_dataset()),
    "(dataset, 3)": lambda: (TensorDataset(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)), 3),
    "([None], [None])": lambda: ([None], [None]),
    "([(x, y)], …) of lists": lambda: ([([1, 2], [3])], [([1, 2], [3])]),
    "batches of other lengths": lambda: ([(torch.zeros(4, 4), torch.zeros(3, dtype=torch.long))],) * 2,
    "batches of negative classes": lambda: ([(torch.zeros(4, 4), torch.full((4,), -1))],) * 2,
    "batches of high classes": lambda: ([(torch.zeros(4, 4), torch.full((4,), 99))],) * 2,
    "batches of bools": lambda: ([(torch.zeros(4, 4), torch.ones(4, dtype=torch.bool))],) * 2,
    "batches of images": lambda: ([(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))],) * 2,
    "batches of no rows": lambda: ([(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))],) * 2,
    "batches of strings": lambda: ([(torch.zeros(2, 4), ["a", "b"])],) * 2,
    "batches of dicts": lambda: ([{"x": torch.zeros(2, 4), "y": torch.zeros(2)}],) * 2,
    "batches of triples": lambda: ([(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))],) * 2,
    "generators": lambda: (generator(), generator()),
    "image": lambda: Image.new("RGB", (8, 8)),
    "[image]": lambda: [Image.new("RGB", (8, 8)), None],
}


def write_files(folder: Path) -> dict[str, Callable[[], Any]]:
    """Write files and folders of wrong kinds, and return their paths."""
    (folder / "empty").mkdir()
    (folder / "empty.safetensors").touch()
    (folder / "note.txt").write_text("not what you look for")
    (folder / "wrong.toml").write_text('source = 3\nedits = "no"\n')
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "noise.pth").write_bytes(bytes(range(256)))
    (folder / "folder.safetensors").mkdir()
    write_photo(folder / "photo.png")
    names = [entry.name for entry in sorted(folder.iterdir())]
    names += ["nothing.safetensors", "no/such/folder/x.safetensors", "note.txt/x.safetensors", "."]
    paths = {f"Path({name})": Path(name) for name in names}
    texts = {f"'{name}'": name for name in names}
    return {key: (lambda value=value: value) for key, value in (paths | texts).items()}


def all_values(folder: Path) -> dict[str, Callable[[], Any]]:
    return PLAIN | TEXTS | CONTAINERS | ARRAYS | NETWORKS | write_files(folder)
