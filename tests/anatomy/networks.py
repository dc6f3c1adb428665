"""Networks that are awkward to look at."""

import threading

import torch
from torch import nn


class DataDependent(nn.Module):
    """Branches on values, counts its calls in a buffer and a list, and holds a lock, which cannot be copied."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.lock = threading.Lock()
        self.log: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1  # pyright: ignore
        self.log.append(len(x))
        x = self.norm(self.first(x))
        if x.sum() > 1e9:
            x = x + 1
        return self.last(self.dropout(x))


class ThroughNumpy(DataDependent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.from_numpy(self.first(x).numpy()))


class ThroughItem(DataDependent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) * float(x.abs().max().item()))


class FailsLate(DataDependent):
    """Changes whatever it can reach before it raises, after it has looked at values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(5)  # pyright: ignore
        self.norm.train()
        self.norm.running_mean.fill_(3)  # pyright: ignore
        self.log.append(int(x.sum().item() * 0))
        torch.rand(3)
        raise RuntimeError("it was all in vain")


class WritesItsWeights(DataDependent):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() < 1e9:
            self.first.weight.data.mul_(2)
        return self.last(self.first(x))


class ReplacesItsWeights(DataDependent):
    """Assigns `.data`, which no operation shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() < 1e9:
            self.first.weight.data = torch.zeros_like(self.first.weight)
        return self.last(self.first(x))


class TwoInputs(nn.Module):
    """Takes two tensors and a word, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(5, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor, how: str = "sum") -> dict[str, torch.Tensor]:
        left, right = self.left(a), self.right(b)
        return {"joined": left + right if how == "sum" else torch.cat([left, right], 1), "left": left}


class SharesLayers(nn.Module):
    """One block under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = self.block
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.again(self.block(x))))
