"""Draw the pictures of `docs/surgery.md`: the top-level layers of a network before and after an edit.

python docs_src/surgery_pictures.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from torch import nn

import regraft

IMAGES = Path(__file__).parents[1] / "docs/images"
COLOURS = {"frozen": "#c9d6e8", "partly frozen": "#e0d6bb", "trainable": "#f6c98f", "new": "#9fd3a8", "": "#eeeeee"}
LABELS = {
    "frozen": "frozen",
    "partly frozen": "partly frozen",
    "trainable": "trained",
    "new": "new",
    "": "no parameters",
}


def main() -> None:
    """Write every picture."""
    loaded = regraft.create_model("resnet18", weights="none", num_classes=300)
    cut = regraft.truncate(loaded, drop=1)
    grown = regraft.append(cut, nn.Linear(512, 400), nn.ReLU(), nn.Linear(400, 300))
    figure, rows = make_rows(3, 12)
    draw_row(rows[0], "the network that was loaded", loaded)
    draw_row(rows[1], "truncate(model, drop=1)", cut)
    regraft.freeze(grown, until="layer3.0")
    draw_row(rows[2], "append(model, Linear, ReLU, Linear), freeze(model, until='layer3.0')", grown)
    figure.savefig(IMAGES / "surgery_resnet18.png")

    loaded = regraft.create_model("timm/vit_tiny_patch16_224", weights="none")
    half = regraft.truncate(loaded, after="blocks.5")
    figure, rows = make_rows(3, 6)
    draw_row(rows[0], "the network that was loaded, 12 blocks", loaded)
    draw_row(rows[1], "truncate(model, after='blocks.5')", half)
    draw_row(rows[2], "append(model, 10)", regraft.append(half, 10))
    figure.savefig(IMAGES / "surgery_vit.png")


def make_rows(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Make an empty picture with that many rows of boxes, and say below them what the colours mean."""
    figure = Figure(figsize=(0.96 * columns, 1.3 * count + 0.3), dpi=110)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.09, hspace=0.35)
    handles = [Patch(fc=colour, ec="#555555", lw=0.8, label=LABELS[state]) for state, colour in COLOURS.items()]
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=len(handles),
        columnspacing=1.2,
        handlelength=1.4,
        frameon=False,
        fontsize=8.5,
    )
    rows = list(figure.subplots(count, 1))
    for axes in rows:
        axes.set_xlim(0, columns)
    return figure, rows


def draw_row(axes: Axes, title: str, model: nn.Module) -> None:
    """Draw a box for each top-level layer that does something, in the order of execution, with its output's shape."""
    axes.set_axis_off()
    axes.set_ylim(-0.45, 1.0)
    axes.set_title(title, loc="left", fontsize=10, family="monospace", pad=2)
    for position, (layer, shape) in enumerate(top_level(model)):
        state = "new" if layer.path.startswith("appended") else layer.state if layer.parameters else ""
        box = FancyBboxPatch(
            (position + 0.04, 0), 0.92, 0.85, boxstyle="round,pad=0,rounding_size=0.08", ec="#555555", lw=0.8
        )
        box.set_facecolor(COLOURS[state])
        axes.add_patch(box)
        kind = layer.type if len(layer.type) <= 13 else layer.type[:12] + "…"
        axes.text(position + 0.5, 0.57, layer.path, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(position + 0.5, 0.27, kind, ha="center", va="center", fontsize=7)
        axes.text(position + 0.5, -0.2, "×".join(map(str, shape[1:])), ha="center", va="center", fontsize=7.5)


def top_level(model: nn.Module) -> list[tuple[regraft.LayerSummary, tuple[int, ...]]]:
    """List the top-level layers, as executed, with the shape that each ends with."""
    called = [layer for layer in regraft.summary(model).layers if layer.path and layer.order is not None]
    called.sort(key=lambda layer: layer.order or 0)
    found = {}
    for layer in regraft.summary(model).layers:
        inside = [one for one in called if one.path == layer.path] or [
            one for one in called if one.path.startswith(f"{layer.path}.") and one.depth == 2
        ]
        if layer.depth == 1 and inside and layer.type not in ("Identity", "Dropout"):
            found[inside[0].order] = (layer, inside[-1].output_shape or ())
    return [found[order] for order in sorted(found, key=lambda order: order or 0)]


if __name__ == "__main__":
    main()
