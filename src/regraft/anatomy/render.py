"""Draw a summary: as a tree in text, as a table in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.anatomy.summary import LayerSummary, ModelSummary

COLUMNS = ("layer", "type", "output", "parameters", "multiply-adds", "state")
RIGHT_ALIGNED = {"parameters", "multiply-adds"}


def text_tree(summary: ModelSummary) -> str:
    """Draw the layers as an indented tree with aligned columns, and the totals below."""
    labels = _tree_labels(summary.shown)
    rows = [(label, *cells(layer)) for label, layer in zip(labels, summary.shown, strict=True)]
    return "\n".join([*aligned([COLUMNS, *rows], [name in RIGHT_ALIGNED for name in COLUMNS]), totals(summary)])


def html_table(summary: ModelSummary) -> str:
    """Draw the layers as an HTML table, indented by depth, for notebooks and reports."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(
        f'<tr><td style="text-align:left;padding-left:{layer.depth * 1.2 + 0.4:.1f}em">{escape(_own_name(layer))}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(layer))
        + "</tr>"
        for layer in summary.shown
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{escape(totals(summary))}</p>"


def totals(summary: ModelSummary) -> str:
    """Say in one line how large the model is, how much of it is trainable, and what one forward costs."""
    root = summary.layers[0]
    line = f"{root.parameters:,} parameters, {root.trainable:,} trainable ({percent(root.trainable, root.parameters)})"
    if summary.problem is not None:
        return f"{line}\nshapes unknown: {summary.problem}"
    return f"{line}, {root.multiply_adds:,} multiply-adds for an input of {shape_text(summary.input_shape)}"


def percent(part: float, whole: float) -> str:
    """Write a share with one decimal where it needs one.

    >>> percent(1, 8), percent(3, 3), percent(0, 0), percent(999_999, 1_000_000)
    ('12.5 %', '100 %', '0 %', '> 99.9 %')
    """
    share = 100 * part / whole if whole else 0.0
    if part != whole and share > 99.9:
        return "> 99.9 %"
    if part and share < 0.1:
        return "< 0.1 %"
    return f"{share:.1f}".removesuffix(".0") + " %"


def cells(layer: LayerSummary) -> tuple[str, ...]:
    """Write one layer's columns beside its name as text."""
    return (
        layer.type,
        shape_text(layer.output_shape),
        f"{layer.parameters:,}" if layer.parameters else "-",
        f"{layer.multiply_adds:,}" if layer.multiply_adds else "-",
        "" if layer.state == "no parameters" else layer.state,
    )


def shape_text(shape: Sequence[int] | None) -> str:
    """Write a shape with multiplication signs, `?` where it is unknown.

    >>> shape_text((1, 3, 224, 224))
    '1×3×224×224'
    """
    return "×".join(map(str, shape)) if shape is not None else "?"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Pad the cells of each column to one width, two spaces between columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _own_name(layer: LayerSummary) -> str:
    return layer.path.rpartition(".")[2] or layer.type


def _tree_labels(layers: Sequence[LayerSummary]) -> Iterable[str]:
    for position, layer in enumerate(layers):
        if layer.depth == 0:
            yield layer.type
            continue
        bars = ["│  " if _continues(layers, position, depth) else "   " for depth in range(1, layer.depth)]
        yield "".join(bars) + ("├─ " if _continues(layers, position, layer.depth) else "└─ ") + _own_name(layer)


def _continues(layers: Sequence[LayerSummary], position: int, depth: int) -> bool:
    """Say whether another layer at `depth` follows under the same parent."""
    following = next((layer.depth for layer in layers[position + 1 :] if layer.depth <= depth), 0)
    return following == depth
