"""The summary of a model as a value, and its rendering as a text tree or a collapsible HTML tree."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Literal

from regraft.anatomy.inputs import Shape

COLUMNS = ("layer", "type", "output", "parameters", "multiply-adds", "state")
SHORT_NAMES = {"parameters": "params", "multiply-adds": "mult-adds"}
NARROWER = ((), ("multiply-adds",), ("multiply-adds", "output"))  # columns that a narrow screen does without
MIN_COLUMN = 8
RIGHT_ALIGNED = {"parameters", "multiply-adds"}

State = Literal["trainable", "frozen", "partly frozen", "no parameters"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a model.

    Attributes:
        path: Dotted path; empty for the model itself.
        type: Name of the layer's class.
        depth: Number of layers above it.
        order: Position in the execution order, from 0; None if it is not called.
        output_shape: Shape of its (first) output, batch included; None where unknown.
        parameters: Number of parameters, inner layers included; a shared one counts once.
        trainable: How many of them are trainable.
        multiply_adds: Multiply-add operations, inner layers included; None where unknown or not called.
        state: `trainable`, `frozen`, `partly frozen`, or `no parameters`.
        output_shapes: Shapes of all tensors in the output of its first call.
        buffers: Number of elements of its buffers, inner layers included; a shared one counts once.
        activation_bytes: Bytes of the outputs of all its calls; for the model itself the sum over the layers that call
            no other layer. None if unknown.
        calls: Number of calls.
        shared_with: First path of the same layer, if it is registered under several. Its calls, costs and inner layers
            are listed there; its parameters count once in each layer around both.
        pinned: Whether it is pinned to evaluation mode, as `freeze` does.
        moves: How it would still change, draw random numbers or depend on its batch although its flags freeze it; None
            if it would not.
        lazy: Whether it has parameters or buffers that the first real forward initializes.
        unknown: Number of lazy parameters of unknown size, which are not counted.
    """

    path: str
    type: str
    depth: int
    order: int | None
    output_shape: Shape | None
    parameters: int
    trainable: int
    multiply_adds: int | None
    state: State
    output_shapes: tuple[Shape, ...] = ()
    buffers: int = 0
    activation_bytes: int | None = None
    calls: int = 0
    shared_with: str | None = None
    pinned: bool = False
    moves: str | None = None
    lazy: bool = False
    unknown: int = 0


@dataclass(frozen=True, repr=False)
class ModelSummary:
    """A tree of layers as a table; `str()` gives it as text, notebooks show HTML.

    Attributes:
        layers: All layers, the model itself first, in registration order.
        input_shape: Shape of the (first) input that the shapes and costs are for, batch included; None where unknown.
        depth: Number of levels that are shown; None: all. `layers` always contains all.
        problem: Why shapes and multiply-adds are unknown; None if they are known.
        input_shapes: Shapes of all inputs.
        note: How shapes were computed, if not by a run on shapes alone.
    """

    layers: tuple[LayerSummary, ...]
    input_shape: Shape | None = None
    depth: int | None = None
    problem: str | None = None
    input_shapes: tuple[Shape, ...] = ()
    note: str | None = None

    @property
    def shown(self) -> tuple[LayerSummary, ...]:
        """The layers down to `depth`."""
        return tuple(layer for layer in self.layers if self.depth is None or layer.depth <= self.depth)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data, with the totals beside the layers."""
        root = self.layers[0]
        return {
            "type": root.type,
            "input_shape": self.input_shape,
            "input_shapes": self.input_shapes,
            "parameters": root.parameters,
            "trainable": root.trainable,
            "buffers": root.buffers,
            "multiply_adds": root.multiply_adds,
            "activation_bytes": root.activation_bytes,
            "problem": self.problem,
            "note": self.note,
            "layers": [asdict(layer) for layer in self.shown],
        }

    def __str__(self) -> str:
        return text_tree(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_tree(self)


def text_tree(summary: ModelSummary, screen: int | None = None) -> str:
    """Render the layers as an indented tree with aligned columns, and the totals below.

    Where the table is wider than the screen, numbers are rounded, and then columns left out.
    """
    labels = _tree_labels(summary.shown)
    rows = [COLUMNS, *((label, *cells(layer)) for label, layer in zip(labels, summary.shown, strict=True))]
    lines = _aligned_columns(rows, COLUMNS)
    for left_out in NARROWER:
        if screen is None or max(map(len, lines)) <= screen:
            break
        short = [tuple(SHORT_NAMES.get(cell) or _short_number(cell) for cell in row) for row in rows]
        lines = _aligned_columns(short, [name for name in COLUMNS if name not in left_out])
    return "\n".join([*lines, totals(summary)])


def _aligned_columns(rows: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    places = [COLUMNS.index(name) for name in names]
    return aligned([[row[place] for place in places] for row in rows], [name in RIGHT_ALIGNED for name in names])


def _short_number(text: str) -> str:
    """Round a number with thousands separators to three digits; any other text stays as it is.

    >>> _short_number("118,013,952"), _short_number("9,408"), _short_number("1,026 + ?")
    ('118 M', '9.41 k', '1,026 + ?')
    """
    if "," not in text or not text.replace(",", "").isdecimal():
        return text
    number = int(text.replace(",", ""))
    size, unit = next((size, unit) for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")) if number >= size)
    return f"{number / size:#.3g}".removesuffix(".") + f" {unit}"


def html_tree(summary: ModelSummary) -> str:
    """Render the layers as a collapsible tree for notebooks; plain HTML without scripts."""
    children: dict[int, list[int]] = {}
    ancestors: list[int] = []
    for position, layer in enumerate(summary.shown):
        del ancestors[layer.depth :]
        if ancestors:
            children.setdefault(ancestors[-1], []).append(position)
        ancestors.append(position)
    tree = "".join(_html_branch(summary.shown, children, 0))
    footer = "".join(f"<p>{escape(line)}</p>" for line in totals(summary).splitlines())
    return f'<div style="font-family:monospace;line-height:1.5">{tree}{footer}</div>'


def totals(summary: ModelSummary) -> str:
    """Return the model's size, its trainable share and the cost of one forward as text."""
    root = summary.layers[0]
    share = percent(root.trainable, root.parameters)
    line = f"{parameters_text(root)} parameters, {root.trainable:,} trainable ({share})"
    if summary.problem is not None:
        return f"{line}\nshapes unknown: {summary.problem}"
    inputs = " and ".join(map(shape_text, summary.input_shapes)) or "nothing"
    line += f", {root.multiply_adds or 0:,} multiply-adds for an input of {inputs}"
    line += f"\noutputs of all layers: {bytes_text(root.activation_bytes or 0)}"
    if root.buffers:
        line += f"; buffers: {root.buffers:,} elements"
    return line if summary.note is None else f"{line}\n{summary.note}"


def percent(part: float, whole: float) -> str:
    """Format a share in percent, with one decimal if needed.

    >>> percent(1, 8), percent(3, 3), percent(0, 0), percent(999_999, 1_000_000)
    ('12.5 %', '100 %', '0 %', '> 99.9 %')
    """
    share = 100 * part / whole if whole else 0.0
    if part != whole and share > 99.9:
        return "> 99.9 %"
    if part and share < 0.1:
        return "< 0.1 %"
    return f"{share:.1f}".removesuffix(".0") + " %"


def bytes_text(count: int) -> str:
    """Format a number of bytes in the largest unit in which it is at least 1.

    >>> bytes_text(24), bytes_text(1536), bytes_text(5 * 2**30)
    ('24 B', '1.5 KiB', '5.0 GiB')
    """
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def cells(layer: LayerSummary) -> tuple[str, ...]:
    """Format the columns of a layer beside its name."""
    if layer.shared_with is not None:
        return (f"(shared with {layer.shared_with or 'the model itself'})", "", "", "", "")
    return (
        layer.type,
        shape_text(layer.output_shape),
        parameters_text(layer) if layer.parameters or layer.unknown else "-",
        f"{layer.multiply_adds:,}" if layer.multiply_adds else "-",
        state_text(layer),
    )


def parameters_text(layer: LayerSummary) -> str:
    """Format the number of parameters, with a question mark for lazy ones of unknown size."""
    if layer.unknown:
        return f"{layer.parameters:,} + ?" if layer.parameters else "?"
    return f"{layer.parameters:,}"


def state_text(layer: LayerSummary) -> str:
    """Format the state of a layer in training: its flags, whether it is pinned, and what would still change."""
    words = [] if layer.state == "no parameters" else [layer.state]
    if layer.pinned:
        words.append("pinned")
    if layer.lazy:
        words.append("lazy")
    if layer.moves is not None:
        words = [*(words or ["frozen"]), f"but {layer.moves}"]
    return ", ".join(words)


def shape_text(shape: Sequence[int] | None) -> str:
    """Format a shape with multiplication signs; `?` if it is unknown.

    >>> shape_text((1, 3, 224, 224))
    '1×3×224×224'
    """
    return "×".join(map(str, shape)) if shape is not None else "?"


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool], screen: int | None = None) -> list[str]:
    r"""Pad the cells of each column to one width, two spaces between columns.

    Where the table is wider than the screen, its widest column of text gets what the others leave. A longer cell in it,
    such as a path, stays whole, and the cells after it go on the next line.

    >>> rows = [("path", "label"), ("ants/a_long_name.jpg", "ants"), ("ants/b.jpg", "bees")]
    >>> print(*aligned(rows, [False, False], 20), sep="\n")
    path        label
    ants/a_long_name.jpg
                ants
    ants/b.jpg  bees
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widest = max(range(len(widths)), key=lambda column: (not right[column], widths[column]))
    room = screen - sum(widths) - 2 * (len(widths) - 1) + widths[widest] if screen is not None else widths[widest]
    if MIN_COLUMN <= room < widths[widest]:
        widths[widest] = max((len(row[widest]) for row in rows if len(row[widest]) <= room), default=0)
    lines = []
    for row in rows:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        if len(row[widest]) > widths[widest]:
            lines.append("  ".join(padded[: widest + 1]))
            padded[: widest + 1] = [" " * width for width in widths[: widest + 1]]
        lines.append("  ".join(padded).rstrip())
    return lines


def _own_name(layer: LayerSummary) -> str:
    return layer.path.rpartition(".")[2] or layer.type


def _html_branch(layers: Sequence[LayerSummary], children: Mapping[int, list[int]], position: int) -> Iterator[str]:
    layer = layers[position]
    rest = " · ".join(escape(cell) for cell in cells(layer) if cell not in ("", "-", "?"))
    line = f"<b>{escape(_own_name(layer))}</b> <span>{rest}</span>"
    if position not in children:
        yield f'<div style="margin-left:1em">{line}</div>'
        return
    is_open = " open" if layer.depth == 0 else ""
    yield f'<details style="margin-left:{1 if layer.depth else 0}em"{is_open}><summary>{line}</summary>'
    for child in children[position]:
        yield from _html_branch(layers, children, child)
    yield "</details>"


def _tree_labels(layers: Sequence[LayerSummary]) -> Iterable[str]:
    for position, layer in enumerate(layers):
        if layer.depth == 0:
            yield layer.type
            continue
        bars = ["│  " if _continues(layers, position, depth) else "   " for depth in range(1, layer.depth)]
        yield "".join(bars) + ("├─ " if _continues(layers, position, layer.depth) else "└─ ") + _own_name(layer)


def _continues(layers: Sequence[LayerSummary], position: int, depth: int) -> bool:
    """Return whether another layer at `depth` follows under the same parent."""
    following = next((layer.depth for layer in layers[position + 1 :] if layer.depth <= depth), 0)
    return following == depth
