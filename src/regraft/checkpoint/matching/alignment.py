"""Align the layers of two networks in the order in which they are registered.

The tensors that one layer owns (weight, bias, running statistics) form a unit. Two units are candidates for a pair if
the shapes of all their tensors are equal. The pairs are the longest common subsequence of both lists, weighted by how
similar the names are. It is computed from the front and from the back: a pair on which both agree is unambiguous.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import digits

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
        path: Path of the layer; the name of the tensor if it is not a weight, bias or running statistic.
        members: Name of each tensor by its role.
        signature: (role, shape without dimensions of length 1) of each tensor.
        exact: (role, shape) of each tensor.
    """

    path: str
    members: Mapping[str, str]
    signature: tuple[tuple[str, Shape], ...]
    exact: tuple[tuple[str, Shape], ...]


def units_of(shapes: Mapping[str, Shape]) -> list[Unit]:
    """Group names with shapes into units, in their order; `num_batches_tracked` belongs to no unit."""
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
    """Return one unit per tensor; scalars such as `num_batches_tracked` are ignored."""
    return [_unit(name, {"value": name}, shapes) for name, shape in shapes.items() if shape]


def align(
    file_units: Sequence[Unit], model_units: Sequence[Unit], *, by_name: bool
) -> tuple[list[tuple[int, int]], dict[int, tuple[int, ...]]]:
    """Pair units of equal shapes in order.

    Args:
        file_units: The units of the file.
        model_units: The units of the model.
        by_name: Whether similar names add to the weight of a pair; otherwise only shapes and order count.

    Returns:
        Pairs of positions; and position in `model_units` → positions in `file_units`, where the order is ambiguous.
    """
    pairs = _subsequence(file_units, model_units, by_name=by_name)
    reversed_pairs = _subsequence(file_units[::-1], model_units[::-1], by_name=by_name)
    mirrored = [(len(file_units) - 1 - i, len(model_units) - 1 - j) for i, j in reversed_pairs]
    choices: dict[int, tuple[int, ...]] = {}
    for i, j in sorted(set(pairs) ^ set(mirrored)):
        choices[j] = (*choices.get(j, ()), i)
    return pairs, choices


def assign(file_units: Sequence[Unit], model_units: Sequence[Unit]) -> list[tuple[int, int, bool]]:
    """Pair units of equal shapes by the similarity of their names, in any order; the most similar pairs first.

    Returns:
        (Position in `file_units`, position in `model_units`, whether these are the only units of their shapes).
    """
    groups: dict[object, tuple[list[int], list[int]]] = {}
    for side, units in enumerate((file_units, model_units)):
        for position, unit in enumerate(units):
            groups.setdefault(unit.signature, ([], []))[side].append(position)
    pairs = []
    for file_positions, model_positions in groups.values():
        is_only = len(file_positions) == len(model_positions) == 1
        ranked = sorted(
            (-path_similarity(file_units[i].path, model_units[j].path), i, j)
            for i in file_positions
            for j in model_positions
        )
        used_file: set[int] = set()
        used_model: set[int] = set()
        for _, i, j in ranked:
            if i not in used_file and j not in used_model:
                pairs.append((i, j, is_only))
                used_file.add(i)
                used_model.add(j)
    return sorted(pairs, key=lambda pair: pair[1])


def words_of(path: str) -> list[tuple[str, str]]:
    """Split the parts of a path into words and numbers.

    >>> words_of("layer1.0.conv2")
    [('layer', '1'), ('', '0'), ('conv', '2')]
    """
    return [(word := part.rstrip(digits), part.removeprefix(word)) for part in path.split(".")]


def path_similarity(a: str, b: str) -> float:
    """Return the similarity of two paths, from 0 to 1: the mean of the shares of common words and of common numbers."""
    (words_a, numbers_a), (words_b, numbers_b) = _parsed(a), _parsed(b)
    common = len(words_a & words_b) / max(1, len(words_a | words_b))
    same = sum(min(count, numbers_b.get(number, 0)) for number, count in numbers_a.items())
    return (common + same / max(1, sum(numbers_a.values()), sum(numbers_b.values()))) / 2


@functools.lru_cache(maxsize=10_000)
def _parsed(path: str) -> tuple[frozenset[str], dict[str, int]]:
    """Return the words of a path, each replaced by the first of its synonyms, and the count of each number."""
    raw_words = {word for word in re.split(r"[\W\d_]+", path.lower()) if word}
    words = frozenset(next((min(group) for group in SYNONYMS if word in group), word) for word in raw_words)
    return words, dict(Counter(re.findall(r"\d+", path)))


def _unit(path: str, members: dict[str, str], shapes: Mapping[str, Shape]) -> Unit:
    exact = tuple(sorted((role, shapes[name]) for role, name in members.items()))
    signature = tuple((role, tuple(side for side in shape if side != 1)) for role, shape in exact)
    return Unit(path, members, signature, exact)


def _subsequence(file_units: Sequence[Unit], model_units: Sequence[Unit], *, by_name: bool) -> list[tuple[int, int]]:
    """Return the common subsequence of the largest weight; among equals, the one with the earliest pairs."""
    kinds: dict[object, int] = {}
    rows = [kinds.setdefault(unit.signature, len(kinds)) for unit in file_units]
    columns = [kinds.setdefault(unit.signature, len(kinds)) for unit in model_units]
    # Dynamic programming from the back: best[i][j] is the largest weight of the units from (i, j) on.
    best = [[0.0] * (len(model_units) + 1) for _ in range(len(file_units) + 1)]
    gain: dict[tuple[int, int], float] = {}
    for i in range(len(file_units) - 1, -1, -1):
        below, row = best[i + 1], best[i]
        for j in range(len(model_units) - 1, -1, -1):
            value = max(below[j], row[j + 1])
            if rows[i] == columns[j]:
                # Each pair weighs 1 and similar names add at most 0.5, so the number of pairs counts more than names.
                weight = 1 + (path_similarity(file_units[i].path, model_units[j].path) / 2 if by_name else 0)
                gain[i, j] = weight
                value = max(value, weight + below[j + 1])
            row[j] = value
    pairs, i, j = [], 0, 0
    while i < len(file_units) and j < len(model_units):
        if (i, j) in gain and best[i][j] <= gain[i, j] + best[i + 1][j + 1] + 1e-9:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
