"""Surgery on every family: each edit equals the original's own activation, and the edited network is saved and loaded.

A small member of every classification family of torchvision and timm. The table that this run makes is
`docs/surgery_families.md`; `make families` writes it anew.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

import regraft
from another_process import Loader, loading, same_images
from families import IS_COMPLETE, NAMES, SOME_NAMES, family, images
from oracles import identical
from regraft.errors import EditError, RegraftError
from regraft.zoo import build

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs/surgery_families.md"
MAX_CUTS = 5
CLASSES = 7
COLUMNS = ("head", "cuts", "append", "insert", "save and load")


@dataclass
class Row:
    """What happened to one network."""

    name: str
    family: str
    outcomes: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def cells(self) -> str:
        found = [self.outcomes.get(column, "") for column in COLUMNS]
        return " | ".join((self.family, f"`{self.name}`", *found, self.problem))


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    found: dict[str, Row] = {}
    yield found
    if IS_COMPLETE and len(found) == len(NAMES):
        write_table(list(found.values()))


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loading() as found:
        yield found


@pytest.mark.parametrize("name", SOME_NAMES)
def test_surgery_families_take_every_edit(name: str, rows: dict[str, Row], loader: Loader, tmp_path: Path) -> None:
    rows[name] = row = Row(name, family(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors
        try:
            model = build(name)
            inputs = images(model)
            model.eval()
            operate(model, inputs, row, loader, tmp_path)
        except (RegraftError, RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            row.problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}".replace("|", "/")
    if not IS_COMPLETE:
        known = {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if "`" in line}
        assert name in known, f"docs/surgery_families.md lacks {name}: run `make families`"
        assert row.problem == "" or row.problem in known[name], row.problem


def operate(model: nn.Module, inputs: torch.Tensor, row: Row, loader: Loader, folder: Path) -> None:
    others = dict(model.state_dict())
    edited = regraft.replace_head(model, CLASSES, inputs=inputs)
    with torch.no_grad():
        assert main(edited(inputs)).shape == (len(inputs), CLASSES)
    same = [path for path, tensor in edited.state_dict().items() if others.get(path) is not None]
    assert len(same) >= len(others) - 8
    row.outcomes["head"] = "yes"

    refused, sizes = 0, []
    cuts = boundaries(model, inputs)
    assert cuts, "no stage after which it could be cut is known"
    for path in cuts:
        tapped = activation(model, path, inputs)
        try:
            cut = regraft.truncate(model, after=path, inputs=inputs)
        except EditError as error:
            if "a skip connection crosses the cut" not in str(error):
                raise
            refused += 1
            cut = regraft.truncate(model, after=path, drop_skips=True, inputs=inputs)
        with torch.no_grad():
            found = cut(inputs)
        assert all(identical(a, b) for a, b in zip(tensors(found), tapped, strict=True)), path
        assert set(cut.state_dict()) <= set(others), path
        sizes.append(len(cut.state_dict()))
        assert all(tensor.data_ptr() == others[key].data_ptr() for key, tensor in cut.state_dict().items())
    assert min(sizes) < len(others)
    row.outcomes["cuts"] = f"{len(cuts)} of {len(cuts)}" + (f", {refused} over skips" if refused else "")

    middle = regraft.truncate(model, after=cuts[len(cuts) // 2], drop_skips=True, inputs=inputs)
    grown, kind = appended(middle, inputs)
    scores = grown.train()(inputs)
    assert scores.shape == (len(inputs), 3)
    scores.sum().backward()
    row.outcomes["append"] = kind

    place = cuts[len(cuts) // 2]
    inserted = regraft.insert(model, nn.Identity(), after=place, inputs=inputs)
    with torch.no_grad():
        assert identical(main(inserted.eval()(inputs)), main(model.eval()(inputs)))
    row.outcomes["insert"] = "yes"

    file = regraft.save(grown.eval(), folder / "edited.safetensors")
    shape = list(inputs.shape)
    with torch.no_grad():
        digest = regraft.checkpoint.file.digest.tensor_digest(grown(same_images(shape)))
    answer = loader.load(file, shape)
    assert "error" not in answer, f"loaded: {answer['error']}"
    assert (answer["outputs"], answer["tensors"]) == ([digest], len(grown.state_dict()))
    file.unlink()
    row.outcomes["save and load"] = "bit-identical"


def appended(cut: nn.Module, inputs: torch.Tensor) -> tuple[nn.Module, str]:
    """Put a classifier on a cut network, of one's own where its output is no map, vector or sequence."""
    try:
        return regraft.append(cut, 3, inputs=inputs), "yes"
    except EditError as error:
        if "tensors, expected one" in str(error) or "gives a" in str(error):
            raise
        return regraft.append(cut, nn.Flatten(), nn.LazyLinear(3), inputs=inputs), "flattened"


def boundaries(model: nn.Module, inputs: torch.Tensor) -> list[str]:
    """Return the ends of a network's stages: its blocks, and the top-level layers that give one tensor."""
    called: list[str] = []
    single: set[str] = set()
    handles = []
    for path, layer in model.named_modules():
        if path and path.count(".") <= 1 and next(layer.parameters(), None) is not None:

            def note(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                called.append(path)
                if isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim >= 2:
                    single.add(path)

            handles.append(layer.register_forward_hook(note))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    once = [path for path in dict.fromkeys(called) if called.count(path) == 1 and path in single][:-1]
    if len(once) <= MAX_CUTS:
        return once
    step = (len(once) - 1) / (MAX_CUTS - 1)
    return [once[round(step * position)] for position in range(MAX_CUTS)]


def activation(model: nn.Module, path: str, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return what a layer gives, as a forward hook sees it; later layers may write to it."""
    seen: list[list[torch.Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, __, output: seen.append([tensor.clone() for tensor in tensors(output)])
    )
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[-1]


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def main(output: Any) -> torch.Tensor:
    return tensors(output)[0]


def write_table(rows: list[Row]) -> None:
    kinds = {kind: [row for row in rows if row.family.startswith(kind)] for kind in ("torchvision", "timm")}
    totals = [f"{sum(not row.problem for row in kind)} of {len(kind)} of {name}" for name, kind in kinds.items()]
    versions = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}"
    lines = [
        "# Surgery on every family",
        "",
        "One small member of every classification family, with random weights. Its head is replaced; it is truncated",
        f"at up to {MAX_CUTS} ends of stages, and each output compared, bit for bit, with the original's own",
        "activation there as a forward hook saw it (cuts over a skip connection are refused first, and then made with",
        "`drop_skips=True`); a classifier is appended to one of these and trained for a step; an identity is inserted,",
        "which must leave the output as it was, bit for bit; the edited network is saved, and another process loads it",
        "and must give the same output, bit for bit. `make families` writes this page.",
        "",
        f"{' and '.join(totals)} families pass ({versions}, timm {timm.__version__}).",
        "",
        f"| family | member | {' | '.join(COLUMNS)} | problem |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
        *(f"| {row.cells()} |" for row in sorted(rows, key=lambda row: row.family)),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
