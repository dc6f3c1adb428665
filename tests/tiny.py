"""Networks with fewer than 10,000 parameters, each with one property that trips careless code."""

from collections import namedtuple
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

SIDE = 8  # pixels
CLASSES = 5

AuxOutputs = namedtuple("AuxOutputs", ["logits", "aux_logits"])


class PlainCnn(nn.Module):
    """Convolutions with batch norm, dropout before the head, and a flatten that lives in forward."""

    preprocessing = {"size": SIDE, "resize": SIDE, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * (SIDE // 2) ** 2, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 6, 8, 8)
        x = F.relu(self.bn2(self.conv2(x)))  # (N, 8, 4, 4)
        return self.fc(self.dropout(x.flatten(1)))


class Residual(nn.Module):
    """Registers its layers head first, and executes them stem first."""

    preprocessing = PlainCnn.preprocessing
    execution = ("stem", "stem_norm", "body.second", "body.first", "shortcut", "head")

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.shortcut = nn.Conv2d(6, 8, 1)
        self.body = nn.ModuleDict(
            {"first": nn.Conv2d(8, 8, 3, padding=1), "second": nn.Conv2d(6, 8, 3, padding=1, bias=False)}
        )
        self.stem_norm = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.body["first"](F.relu(self.body["second"](x)))
        return self.head((y + self.shortcut(x)).mean((2, 3)))


class Tied(nn.Module):
    """An encoder and a decoder with one weight between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.decoder = nn.Linear(12, 12)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(F.relu(self.norm(self.encoder(x)))))


class NoisyBlock(nn.Module):
    """Dropout as a function that looks at `self.training`, as many published blocks have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.relu(self.linear(x)), 0.5, training=self.training)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1 = NoisyBlock(12)
        self.block2 = NoisyBlock(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block2(self.block1(x)))


class RootToken(nn.Module):
    """A class token and positions that belong to the root module, as in vision transformers."""

    preprocessing = PlainCnn.preprocessing

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.patches = nn.Conv2d(3, 8, SIDE // 2, stride=SIDE // 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, 4, 8)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions  # (N, 5, 8)
        return self.head(self.norm(self.block(x))[:, 0])


class AuxHead(nn.Module):
    """Returns a namedtuple with a second head's scores while it trains, as Inception does."""

    preprocessing = PlainCnn.preprocessing

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.aux = nn.Linear(6, CLASSES)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor | AuxOutputs:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return AuxOutputs(self.fc(x), self.aux(x)) if self.training else self.fc(x)


class InputNorm(nn.Module):
    """Normalizes its input with running statistics and no parameters, in front of everything that can be frozen."""

    preprocessing = PlainCnn.preprocessing

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(3, affine=False)
        self.conv = nn.Conv2d(3, 6, 3)
        self.between = nn.BatchNorm2d(6, affine=False)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(F.relu(self.between(self.conv(self.normalize(x)))))
        return self.fc(x.mean((2, 3)))


def sequential() -> nn.Sequential:
    """Build a network of torch.nn layers alone, in which one activation stands in three places."""
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 6, (3, 3), stride=2, padding="valid", bias=False),
        nn.BatchNorm2d(6),
        relu,
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), relu),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(6, CLASSES),
        relu,
    )


IMAGE_NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": PlainCnn,
    "residual": Residual,
    "root-token": RootToken,
    "aux-head": AuxHead,
    "input-norm": InputNorm,
    "sequential": sequential,
}
VECTOR_NETS: dict[str, Callable[[], nn.Module]] = {"tied": Tied, "functional-dropout": FunctionalDropout}
ALL = IMAGE_NETS | VECTOR_NETS


def build(name: str, seed: int = 0) -> nn.Module:
    """Build one of the networks with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ALL[name]()


def batch(name: str, count: int = 6, seed: int = 1) -> torch.Tensor:
    """Draw inputs (N, 3, 8, 8) or (N, 12) for the network called `name`."""
    shape = (count, 12) if name in VECTOR_NETS else (count, 3, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
