"""Compare two models or checkpoint files tensor by tensor: what is bit-identical, and how far the rest moved."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from regraft.anatomy.summary_table import aligned, shape_text
from regraft.anatomy.wrappers import unwrapped
from regraft.arguments import check_arguments, check_weights
from regraft.checkpoint.any_file import read_tensors
from regraft.checkpoint.file.digest import tensor_digest
from regraft.checkpoint.file.format import locate
from regraft.checkpoint.storable import require_bytes
from regraft.display import block, some

Kind = Literal["identical", "changed", "reshaped", "added", "removed"]


@dataclass(frozen=True)
class TensorDiff:
    """The comparison of one tensor.

    Attributes:
        name: Name in the state dict.
        kind: `identical` bit for bit, `changed` in value or dtype, `reshaped`, `added` (only in the second) or
            `removed` (only in the first).
        relative_norm: ‖b - a‖ / ‖a‖ of a changed tensor in float64; None if undefined (a is zero, or holds NaN or
            infinity).
        before: Shape in the first.
        after: Shape in the second.
    """

    name: str
    kind: Kind
    relative_norm: float | None = None
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None


@dataclass(frozen=True, repr=False)
class Diff:
    """The comparison of two models, in the order of the first; `str()` groups layers whose tensors agree."""

    tensors: tuple[TensorDiff, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors of each kind that occurs."""
        return dict(Counter(tensor.kind for tensor in self.tensors))

    @property
    def identical(self) -> bool:
        """Whether every tensor is bit-identical."""
        return set(self.counts) <= {"identical"}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {
            "identical": self.identical,
            "counts": self.counts,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def __repr__(self) -> str:
        names = {kind: [tensor.name for tensor in self.tensors if tensor.kind == kind] for kind in self.counts}
        return block(
            f"Diff: {'identical, ' if self.identical else ''}{len(self.tensors)} tensors",
            [(kind, f"{len(of_kind)}: {some(of_kind)}") for kind, of_kind in names.items()],
        )

    def __str__(self) -> str:
        rows = [("tensor", "state", "relative change", "shape"), *self._rows()]
        total = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return "\n".join([*aligned(rows, [False, False, True, False]), f"{len(self.tensors)} tensors: {total}"])

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for top, members in groupby(self.tensors, key=lambda tensor: tensor.name.partition(".")[0]):
            group = list(members)
            kinds = {tensor.kind for tensor in group}
            if len(group) > 1 and len(kinds) == 1 and kinds <= {"identical", "added", "removed"}:
                yield f"{top}.*", group[0].kind, "", f"{len(group)} tensors"
                continue
            for tensor in group:
                norm = f"{tensor.relative_norm:.3g}" if tensor.relative_norm is not None else ""
                shapes = [shape_text(shape) for shape in (tensor.before, tensor.after) if shape is not None]
                yield tensor.name, tensor.kind, norm, " → ".join(dict.fromkeys(shapes)) or "scalar"


def diff(a: nn.Module | str | os.PathLike[str], b: nn.Module | str | os.PathLike[str]) -> Diff:
    """Compare two models, or files of weights, tensor by tensor, including buffers. Nothing is changed.

    Args:
        a: A module, or a file that `load_weights` can read.
        b: Another one.

    Raises:
        CheckpointError: A file cannot be read without running code, or a tensor has no bytes of its own.

    >>> layer = nn.Linear(2, 2)
    >>> print(diff(layer, layer))
    tensor  state      relative change  shape
    weight  identical                   2×2
    bias    identical                   2
    2 tensors: 2 identical
    """
    check_arguments(diff, locals())
    for name, source in (("a", a), ("b", b)):
        if isinstance(source, nn.Module):
            check_weights(diff, name, source)
    before, after = _tensors(a), _tensors(b)
    for tensors in (before, after):
        require_bytes(tensors)
    names = [*before, *(name for name in after if name not in before)]
    return Diff(tuple(_compare(name, before.get(name), after.get(name)) for name in names))


def _tensors(source: nn.Module | str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    if isinstance(source, nn.Module):
        state = unwrapped(source)[1].state_dict()
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return read_tensors(locate(Path(source)))[0]


def _compare(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> TensorDiff:
    before, after = (tuple(tensor.shape) if tensor is not None else None for tensor in (a, b))
    if a is None or b is None:
        return TensorDiff(name, "added" if a is None else "removed", None, before, after)
    if before != after:
        return TensorDiff(name, "reshaped", None, before, after)
    if a is b or tensor_digest(a) == tensor_digest(b):
        return TensorDiff(name, "identical", None, before, after)
    return TensorDiff(name, "changed", _relative_norm(a, b), before, after)


def _relative_norm(a: torch.Tensor, b: torch.Tensor) -> float | None:
    before, after = a.cpu().double(), b.cpu().double()
    relative = ((after - before).norm() / before.norm()).item()
    return relative if torch.isfinite(torch.tensor(relative)) else None
