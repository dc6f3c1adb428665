"""Match the layers of two networks in the order in which they are registered.

Tensors that one layer owns (weight, bias, running statistics) go together as a unit. Two units may belong to each other
where the shapes of all their tensors are equal; which of them do is the longest common subsequence of both lists,
weighed by how alike the names are. It is worked out from the front and from the back: pairs on which both agree have no
rival in order.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ROLES = ("weight", "bias", "running_mean", "running_var")
COUNTER = "num_batches_tracked"
SYNONYMS = (
    {"norm", "bn", "ln", "layernorm", "batchnorm", "gn"},
    {"fc", "linear", "head", "heads", "classifier", "dense", "lin", "proj"},
    {"attn", "attention", "self_attn", "selfattention", "self"},
    {"block", "blocks", "layer", "layers", "stage", "stages", "encoder", "features"},
    {"conv", "convolution", "c", "stem"},
    {"embed", "embedding", "embeddings", "pos", "position", "token", "class", "cls"},
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """The tensors that one layer owns.

    Attributes:
        path: Of the layer; for a tensor that is no weight, bias or running statistic, of the tensor itself.
        members: Name of each tensor by its role.
        signature: Role and shape of each, without sides of length 1.
        exact: The same with all sides.
    """

    path: str
    members: Mapping[str, str]
    signature: tuple[tuple[str, Shape], ...]
    exact: tuple[tuple[str, Shape], ...]


def units_of(shapes: Mapping[str, Shape]) -> list[Unit]:
    """Group names with shapes into units, in their order; counters of batches go with no unit."""
    groups: dict[str, dict[str, str]] = {}
    for name in shapes:
        parent, _, last = name.rpartition(".")
        stem, _, role = last.rpartition("_") if last not in ROLES else ("", "", last)
        if last == COUNTER:
            continue
        if role in ROLES[:2]:  # also in_proj_weight and the like
            groups.setdefault(parent + (f".{stem}" if stem else ""), {})[role] = name
        elif last in ROLES:
            groups.setdefault(parent, {})[last] = name
        else:
            groups.setdefault(name, {})["value"] = name
    return [_unit(path, members, shapes) for path, members in groups.items()]


def single_units(shapes: Mapping[str, Shape]) -> list[Unit]:
    """Make a unit of each tensor by itself; single numbers, as the counters of batches are, go with none."""
    return [_unit(name, {"value": name}, shapes) for name, shape in shapes.items() if shape]


def align(
    theirs: Sequence[Unit], ours: Sequence[Unit], *, by_name: bool
) -> tuple[list[tuple[int, int]], dict[int, tuple[int, ...]]]:
    """Pair units of equal shapes in order.

    Args:
        theirs: The units of the file.
        ours: The units of the model.
        by_name: Whether alike names weigh; otherwise shapes and order alone do.

    Returns:
        Pairs of positions; and for positions in `ours` for which the order leaves a choice, those in `theirs` that
        would do.
    """
    pairs = _subsequence(theirs, ours, by_name=by_name)
    back = _subsequence(theirs[::-1], ours[::-1], by_name=by_name)
    mirrored = [(len(theirs) - 1 - i, len(ours) - 1 - j) for i, j in back]
    choices: dict[int, tuple[int, ...]] = {}
    for i, j in sorted(set(pairs) ^ set(mirrored)):
        choices[j] = (*choices.get(j, ()), i)
    return pairs, choices


def assign(theirs: Sequence[Unit], ours: Sequence[Unit]) -> list[tuple[int, int, bool]]:
    """Pair units of equal shapes by how alike their names are, whatever their order; the most alike first.

    Returns:
        Positions, and whether no other unit of these shapes was left on either side.
    """
    groups: dict[object, tuple[list[int], list[int]]] = {}
    for side, units in enumerate((theirs, ours)):
        for position, unit in enumerate(units):
            groups.setdefault(unit.signature, ([], []))[side].append(position)
    pairs = []
    for left, right in groups.values():
        is_only = len(left) == len(right) == 1
        ranked = sorted((-likeness(theirs[i].path, ours[j].path), i, j) for i in left for j in right)
        used_i: set[int] = set()
        used_j: set[int] = set()
        for _, i, j in ranked:
            if i not in used_i and j not in used_j:
                pairs.append((i, j, is_only))
                used_i.add(i)
                used_j.add(j)
    return sorted(pairs, key=lambda pair: pair[1])


def words_of(path: str) -> list[tuple[str, str]]:
    """Split the parts of a path into words and numbers.

    >>> words_of("layer1.0.conv2")
    [('layer', '1'), ('', '0'), ('conv', '2')]
    """
    pieces = []
    for part in path.split("."):
        number = re.search(r"\d+$", part)
        pieces.append((part[: number.start()] if number else part, number[0] if number else ""))
    return pieces


def likeness(a: str, b: str) -> float:
    """Describe how alike two paths are, from 0 to 1: words in common, synonyms included, and the same numbers."""
    (words_a, numbers_a), (words_b, numbers_b) = _parsed(a), _parsed(b)
    common = len(words_a & words_b) / max(1, len(words_a | words_b))
    same = sum(min(count, numbers_b.get(number, 0)) for number, count in numbers_a.items())
    return (common + same / max(1, sum(numbers_a.values()), sum(numbers_b.values()))) / 2


@functools.lru_cache(maxsize=10_000)
def _parsed(path: str) -> tuple[frozenset[str], dict[str, int]]:
    """Return the words of a path, each as the first of its synonyms, and how often it has each number."""
    found = {word for word in re.split(r"[\W\d_]+", path.lower()) if word}
    words = frozenset(next((min(group) for group in SYNONYMS if word in group), word) for word in found)
    return words, dict(Counter(re.findall(r"\d+", path)))


def _unit(path: str, members: dict[str, str], shapes: Mapping[str, Shape]) -> Unit:
    exact = tuple(sorted((role, shapes[name]) for role, name in members.items()))
    return Unit(path, members, tuple((role, _squeezed(shape)) for role, shape in exact), exact)


def _squeezed(shape: Iterable[int]) -> Shape:
    return tuple(side for side in shape if side != 1)


def _subsequence(theirs: Sequence[Unit], ours: Sequence[Unit], *, by_name: bool) -> list[tuple[int, int]]:
    """Return the best common subsequence; among equals, the one whose pairs come first."""
    kinds: dict[object, int] = {}
    rows = [kinds.setdefault(unit.signature, len(kinds)) for unit in theirs]
    columns = [kinds.setdefault(unit.signature, len(kinds)) for unit in ours]
    best = [[0.0] * (len(ours) + 1) for _ in range(len(theirs) + 1)]  # of what comes from (i, j) on
    gain: dict[tuple[int, int], float] = {}
    for i in range(len(theirs) - 1, -1, -1):
        below, row = best[i + 1], best[i]
        for j in range(len(ours) - 1, -1, -1):
            value = max(below[j], row[j + 1])
            if rows[i] == columns[j]:
                weight = 1 + (likeness(theirs[i].path, ours[j].path) / 2 if by_name else 0)
                gain[i, j] = weight
                value = max(value, weight + below[j + 1])
            row[j] = value
    pairs, i, j = [], 0, 0
    while i < len(theirs) and j < len(ours):
        if (i, j) in gain and best[i][j] <= gain[i, j] + best[i + 1][j + 1] + 1e-9:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
