"""Find the heads of a network that give class scores, and how many scores each gives per class."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from regraft.anatomy.heads import Head, width_of
from regraft.card import card_of
from regraft.errors import EditError
from regraft.wording import for_caller

COUNTS = ("num_classes", "num_labels")  # attributes in which networks keep the number of their classes
MAX_NAMED = 12  # heads in a message
OTHER_KINDS = re.compile(r"box|regress|offset|coord|anchor|mask|keypoint|distance|depth")  # in names: no scores


@dataclass(frozen=True)
class ClassHead:
    """A head that gives scores of classes.

    Attributes:
        path: See `Head`.
        scores_per_class: Number of scores for each class: 1, or one for each anchor of a detector.
    """

    path: str
    scores_per_class: int = 1


def class_heads(model: nn.Module, heads: Sequence[Head]) -> list[ClassHead]:
    """Return those of the heads of `model` that give scores of classes.

    One head is taken for that. Of several it is those whose width is the number of classes that the network states
    (`num_classes`, `num_labels`, its card), or a multiple of it, where the outputs or the layer around the head show
    that it is one; where nothing is stated, all of them if they are of one width, and that of their outputs.

    Raises:
        EditError: Several heads of different kinds, and nothing says which of them give the classes; all are named.
    """
    widths = {head.path: _width(model, head) for head in heads}
    stated = {head.path: _stated(model, head.path) for head in heads}
    everything = {count for counts in stated.values() for count in counts if count > 1}
    exact = [head for head in heads if widths[head.path] in everything]
    several = [head for head in heads if head not in exact and _is_multiple(widths[head.path], everything)]
    shown = [(head, count) for head in several if (count := _shown_count(model, head)) is not None]
    chosen: list[ClassHead] = []
    if shown and not exact and len({head.outputs for head, _ in shown}) == 1:  # of one output, at several scales
        chosen = [ClassHead(head.path, (widths[head.path] or 0) // count) for head, count in shown]
    elif len(heads) == 1:
        return [ClassHead(heads[0].path)]
    elif exact and not several and len({widths[head.path] for head in exact}) == 1:
        with_background = {count + 1 for count in everything}  # as DETR's, whose boxes may be as wide as its classes
        chosen = [] if with_background & set(widths.values()) else [ClassHead(head.path) for head in exact]
    elif len(set(widths.values())) == 1 and not everything and all(_is_width_shown(model, head) for head in heads):
        chosen = [ClassHead(head.path) for head in heads]
    names = {head.path: " ".join([head.path, *(name for name, _ in head.outputs)]).lower() for head in heads}
    if not chosen or (len(heads) > 1 and any(OTHER_KINDS.search(names[head.path]) for head in chosen)):
        raise EditError(_question(model, heads))
    return chosen


def _question(model: nn.Module, heads: Sequence[Head]) -> str:
    described = [f"'{head.path}'" + (f" ({width} outputs)" if (width := _width(model, head)) else "") for head in heads]
    named = ", ".join(described[:MAX_NAMED]) + (f" and {len(heads) - MAX_NAMED} more" if len(heads) > MAX_NAMED else "")
    first, second = heads[0].path, heads[1].path
    advice = for_caller(
        python=f"Pass their paths: replace_head(model, 10, path='{first}'), path=[…] for several, or each with a width "
        f"of its own as in replace_head(model, {{'{first}': 10, '{second}': 40}}).",
        command="In Python, regraft.replace_head takes their paths.",
    )
    return (
        f"{type(model).__name__} has several heads, and which of them give the classes is unclear: {named}. {advice} "
        "Nothing was changed."
    )


def _width(model: nn.Module, head: Head) -> int | None:
    layer = dict(model.named_modules(remove_duplicate=False)).get(head.path)
    return width_of(layer) if layer is not None else None


def _stated(model: nn.Module, path: str) -> set[int]:
    """Return the class counts that the network and the layers around a head declare."""
    counts = {len(classes)} if (classes := card_of(model).classes) is not None else set()
    for owner in _around(model, path):
        values = [vars(owner).get(name) for name in COUNTS]  # not of a configuration, where 2 is the default
        counts |= {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
    return counts


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    yield model
    parts = path.split(".")
    for length in range(1, len(parts)):
        yield model.get_submodule(".".join(parts[:length]))


def _is_multiple(width: int | None, counts: set[int]) -> bool:
    return width is not None and any(width > count and width % count == 0 for count in counts)


def _shown_count(model: nn.Module, head: Head) -> int | None:
    """Return the class count of a head with several scores per class, if there is evidence for it.

    Evidence is an output with a dimension of that size, or the declaration of the parent layer.
    """
    width = _width(model, head) or 0
    counts = {count for count in _stated(model, head.path) if count > 1 and width > count and width % count == 0}
    by_shape = [count for count in counts if _is_by_shape(head, count)]
    parent = model.get_submodule(head.path.rpartition(".")[0]) if "." in head.path else None
    by_parent = [
        count for count in counts if parent is not None and count in (vars(parent).get(name) for name in COUNTS)
    ]
    return next(iter([*by_shape, *by_parent]), None)


def _is_by_shape(head: Head, count: int) -> bool:
    return any(count in shape[1:] for _, shape in head.outputs)


def _is_width_shown(model: nn.Module, head: Head) -> bool:
    width = _width(model, head)
    return any(width in shape[1:] for _, shape in head.outputs)
