"""Frozen means bit-identical on every family: a small member of each is half frozen, split, trained, and compared.

The table that this run makes is `docs/families.md`; `make families` writes it anew.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from families import ALL_NAMES, IS_COMPLETE, NAMES, SOME_OF_ALL, build_any, family, images, middle
from oracles import identical
from regraft.anatomy.modes import evaluation_mode
from regraft.errors import RegraftError
from regraft.freezing import freeze
from regraft.freezing.pins import frozen_layers
from regraft.frontier import partition

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs/families.md"


@dataclass(frozen=True)
class Row:
    """What happened to one network."""

    name: str
    family: str
    parameters: int = 0
    until: str = ""
    share: float = 0.0
    problem: str = ""
    split: str = ""

    def cells(self) -> str:
        figures = (f"{self.parameters:,}", f"`{self.until}`", f"{self.share:.0%}") if self.until else ("", "", "")
        return " | ".join((self.family, f"`{self.name}`", *figures, self.problem or "bit-identical", self.split))


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    found: dict[str, Row] = {}
    yield found
    if IS_COMPLETE and len(found) == len(ALL_NAMES):
        write_table(list(found.values()))


@pytest.mark.parametrize("name", SOME_OF_ALL)
def test_freeze_keeps_every_family_bit_identical(name: str, rows: dict[str, Row]) -> None:
    known = (
        {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if "`" in line} if TABLE.exists() else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors
        # A part of the networks is held against the table, from the layer that it names on.
        cells = known.get(name, "").split("`")
        until = cells[3] if len(cells) > 3 and not IS_COMPLETE else None
        rows[name] = row = freeze_half_and_train(name, until)
    if not IS_COMPLETE:
        assert name in known, f"docs/families.md lacks {name}: run `make families`"
        assert row.problem == "" or row.problem.partition(":")[0] in known[name]
        assert row.split in known[name]


def test_freeze_families_are_all_of_both_libraries() -> None:
    theirs = {family(f"timm/{name}") for name in timm.list_models()}
    theirs |= {family(name) for name in torchvision.models.list_models(module=torchvision.models)}
    assert {family(name) for name in NAMES} == theirs


def freeze_half_and_train(name: str, until: str | None) -> Row:
    try:
        model = build_any(name)
        inputs = images(model)
        until = until or middle(model)
        report = freeze(model, until=until)
        split = split_in_two(model, inputs)
    except (RegraftError, RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        return Row(name, family(name), problem=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    layers = {path for path, _ in frozen_layers(model)}
    before = {key: tensor.detach().clone() for key, tensor in tensors(model).items()}
    train(model, inputs)
    after = tensors(model)
    held = [key for key in after if key in frozen or key.rpartition(".")[0] in layers]
    assert frozen
    assert [key for key in held if not identical(before[key], after[key])] == []
    trained = {key: p for key, p in model.named_parameters() if p.grad is not None and p.detach().abs().sum() > 0}
    assert trained
    assert [key for key in trained if identical(before[key], after[key])] == []
    return Row(name, family(name), report.total, until, report.frozen / report.total, split=split)


def split_in_two(model: nn.Module, inputs: torch.Tensor) -> str:
    """Return where the frontier lies; both parts must give what the whole gives, and no image may need another."""
    try:
        parts = partition(model, inputs)
    except RegraftError as error:
        return f"{type(error).__name__}: {str(error)[:300]}".replace("|", "/").replace("\n", " ")
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(parts.suffix):
        kept = parts.prefix(inputs)
        ours, whole = (
            [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            for output in (parts.suffix(*kept), model(inputs))
        )
        turned = parts.prefix(inputs.flip(0))
    assert all(identical(a, b) for a, b in zip(ours, whole, strict=True))
    assert all(torch.allclose(a, b.flip(0), atol=1e-3) for a, b in zip(kept, turned, strict=True))
    constant, live = parts.multiply_adds
    places = ", ".join(f"`{cut.layer or cut.name}`" for cut in parts.frontier)
    how = " recorded" if "recorded" in (parts.note or "") else ""
    return (
        f"{constant / (constant + live):.0%} constant, before {places}{how}"
        if how
        else (f"{constant / (constant + live):.0%} constant, after {places}")
    )


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, those that no state dict has included."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def train(model: nn.Module, inputs: torch.Tensor) -> None:
    """Take three steps that would move whatever may move: momentum, decay of everything, training mode."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        outputs = [x for x in tree_leaves(model.train()(inputs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        optimizer.zero_grad()
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        optimizer.step()


def write_table(rows: list[Row]) -> None:
    kinds = {
        kind: [row for row in rows if row.family.startswith(kind)] for kind in ("torchvision", "timm", "transformers")
    }
    totals = [f"{sum(not row.problem for row in kind)} of {len(kind)} of {name}" for name, kind in kinds.items()]
    import transformers

    versions = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}"
    lines = [
        "# Families",
        "",
        "One small member of every classification family, with random weights: frozen up to the layer in the middle,",
        "three steps of SGD with momentum and weight decay in training mode, then every frozen tensor, buffers",
        "included, is compared bit by bit, and every trained one must have moved. Before that, `partition` splits it:",
        "the two parts must give what the whole gives, bit for bit, and no image of a batch may need another in the",
        "constant part. The last column says how much of the multiply-adds that part has, and where it ends. The",
        "networks of transformers have a few thousand parameters and are made from their configuration.",
        "`make families` writes this page.",
        "",
        f"{', '.join(totals[:-1])} and {totals[-1]} families pass",
        f"({versions}, timm {timm.__version__}, transformers {transformers.__version__}).",
        "",
        "| family | member | parameters | frozen until | frozen | outcome | partition |",
        "|---|---|---:|---|---:|---|---|",
        *(f"| {row.cells()} |" for row in sorted(rows, key=lambda row: row.family)),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
