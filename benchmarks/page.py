"""Write docs/benchmarks.md and its plot from what the benchmarks left in `benchmarks/results/`.

python benchmarks/page.py
"""

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
INTRODUCTION = """# Benchmarks

`make bench` measures all of this anew and writes this page. Each contender is a program in `benchmarks/contenders/`,
run as a process of its own; they take turns. The figures are medians over the rounds, each with another seed (accuracy
of the last and of the best epoch: mean, least and most), of which there were {repeats} in the first table. All of them
train on the hymenoptera photos of PyTorch's transfer learning tutorial (245 to learn from, 153 for validation), from
the same first weights, for {epochs} epochs with validation in each, in batches of 32, with two loading processes where
they have any.

Machine: {machine}.

*Seconds* count from the first look into the data folder to the final weights, without imports and the building of the
network; for regraft that includes splitting the network and choosing the learning rate among heads trained side by
side. *Process* counts everything, imports included. A *view* is a version of a photo that is computed once; the
contenders draw a new random part of each photo in every epoch.
"""
LIMIT_NOTE = """
The *limit* is what nobody can do without: decode every photo once (two processes), and run the network on it once,
plainly. regraft runs the frozen part faster than that, with batch norms folded into convolutions and channels last in
memory, and spends part of what this saves on splitting the network and on choosing among heads.

Accuracy is measured on {count} photos, of which one is {one:.2%}: differences of one or two photos are chance. The
final weights of regraft and of the tutorial are those of the best epoch; the other loops end with the last. The best of
25 epochs says more of how much an accuracy wavers than of how good it is: a head that stays at ridge regression hardly
wavers.
"""


NOT_MEASURED = """## What was not measured

Nothing on this page ran on a GPU, and the contenders know none. There, features that need less than a quarter of the
free memory stay on the device and whole batches are gathered there, photos come from pinned memory, and the forward
pass runs in bfloat16. CUDA graphs and a stream of their own for copies are not used.
"""


def main() -> None:
    """Write the page."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))}
    head = found["head"]
    repeats = len(next(iter(head["runs"].values())))
    parts = [INTRODUCTION.format(repeats=repeats, epochs=head["epochs"], machine=head["machine"])]
    parts += [f"## {head['title']}\n", table(head), LIMIT_NOTE.format(count=153, one=1 / 153)]
    parts.append("![Seconds of each contender](images/benchmarks.png)\n")
    draw(head)
    if "resnet18" in found:
        parts += [f"## {found['resnet18']['title']}\n", table(found["resnet18"])]
    if "everything" in found:
        parts += [f"## {found['everything']['title']}\n", elsewhere(found["everything"], head)]
        parts.append(epochs_table(found["everything"]))
    if "live_part" in found:
        parts += ["## resnet18, frozen up to `layer3.0`\n", live_table(found["live_part"])]
    if "views" in found:
        parts += ["## How many views\n", views_table(found["views"])]
    if "memory" in found:
        parts += ["## Memory\n", memory_table(found["memory"])]
    if "compiled" in found:
        parts += ["## `torch.compile`\n", compiled_table(found["compiled"])]
    parts.append(NOT_MEASURED)
    (DOCS / "benchmarks.md").write_text("\n".join(parts))


def elsewhere(found: dict[str, Any], first: dict[str, Any]) -> str:
    """Name the machine of a scenario where it is another than that of the first table."""
    return f"On {found['machine']}.\n" if found["machine"] != first["machine"] else ""


def table(found: dict[str, Any]) -> str:
    """Return the table of a scenario."""
    runs = found["runs"]
    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    process = {name: statistics.median(run["process"] for run in of) for name, of in runs.items()}
    tutorial = next(name for name in runs if name.startswith("tutorial"))
    limit = next(name for name in runs if name.startswith("limit"))
    columns = ("seconds", "× faster than the tutorial", "of the limit", "process", "× faster", "last epoch")
    rows = [f"| | {' | '.join((*columns, 'best epoch', 'peak memory'))} |", "|---|---|---|---|---|---|---|---|---|"]
    for name, of in sorted(runs.items(), key=lambda item: -seconds[item[0]]):
        is_limit = name == limit
        faster = "" if is_limit else f"{seconds[tutorial] / seconds[name]:.1f}"
        whole = "" if is_limit else f"{process[tutorial] / process[name]:.1f}"
        peaks = [run["peak_mib"] for run in of if "peak_mib" in run]
        cells = (
            name,
            f"{seconds[name]:.2f}",
            faster,
            f"{seconds[name] / seconds[limit]:.2f}",
            f"{process[name]:.2f}",
            whole,
            spread(of, "accuracy"),
            spread(of, "best"),
            f"{statistics.median(peaks):,.0f} MiB" if peaks else "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(runs: list[dict[str, Any]], figure: str) -> str:
    """Return the mean, the least and the most of an accuracy."""
    found = [run[figure] for run in runs if run[figure] is not None]
    return f"{statistics.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})" if found else ""


def epochs_table(found: dict[str, Any]) -> str:
    """Return the table of seconds of an epoch from the second on."""
    rows = ["| | seconds of an epoch from the second on | photos per second | × |", "|---|---|---|---|"]
    later = {name: statistics.median(s for run in of for s in run["epochs"][1:]) for name, of in found["runs"].items()}
    slowest = max(later.values())
    for name, seconds in later.items():
        rows.append(f"| {name} | {seconds:.2f} | {398 / seconds:.0f} | {slowest / seconds:.2f} |")
    return "\n".join(rows) + "\n"


def live_table(found: dict[str, Any]) -> str:
    """Return the table of an epoch once the constant part is computed."""
    medians = found["medians"]
    rows = [
        "Seconds of an epoch: forward and backward over 245 photos, and a forward pass over 153.\n",
        "| | seconds | of the live part by hand |",
        "|---|---|---|",
    ]
    by_hand = medians["live part by hand"]
    rows += [f"| {name} | {seconds:.2f} | {seconds / by_hand:.2f} |" for name, seconds in medians.items()]
    return "\n".join(rows) + "\n"


def views_table(found: dict[str, Any]) -> str:
    """Return the table of accuracy and seconds by the number of views."""
    rows = [found["title"] + "\n", "| views | seconds | last epoch | kept epoch |", "|---|---|---|---|"]
    rows += [
        f"| {name} | {row['seconds']:.2f} | {row['last']} | {row['kept']} |" for name, row in found["rows"].items()
    ]
    return "\n".join(rows) + "\n"


def memory_table(found: dict[str, Any]) -> str:
    """Return the table of peak memory by the number of photos."""
    rows = [
        "Photos of 16 × 16 pixels, features of 16 KiB each in a file, two epochs.\n",
        "| photos | peak memory | features on the disk | estimated before | seconds |",
        "|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        rows.append(
            f"| {run['photos']:,} | {run['peak_mib']:,.0f} MiB | {run['disk_bytes'] / 2**20:,.1f} MiB | "
            f"{run['estimated_bytes'] / 2**20:,.1f} MiB | {run['seconds']:.0f} |"
        )
    return "\n".join(rows) + "\n"


def compiled_table(found: dict[str, Any]) -> str:
    """Return the table of what compiling the constant part costs and saves."""
    rows = [
        "The constant part as `fit` runs it, beside the same compiled. It pays from so many photos on that `fit` does "
        "not compile.\n",
        "| network | seconds to compile | ms a photo | compiled | pays from |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        after = f"{row['pays_from']:,.0f} photos" if row["pays_from"] is not None else "never"
        rows.append(f"| {name} | {row['compile_s']:.1f} | {row['eager_ms']:.2f} | {row['compiled_ms']:.2f} | {after} |")
    return "\n".join(rows) + "\n"


def draw(found: dict[str, Any]) -> None:
    """Draw the seconds of each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in found["runs"].items()}
    names = sorted(seconds, key=lambda name: -seconds[name])
    colours = [
        "#1f6f8b" if n.startswith("regraft") else "#b0b7bf" if not n.startswith("limit") else "#d9a441" for n in names
    ]
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    bars = axes.barh(names, [seconds[name] for name in names], color=colours)
    axes.bar_label(bars, [f" {seconds[name]:.1f} s" for name in names], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(right=max(seconds.values()) * 2)
    axes.set_xlabel("seconds (logarithmic), from the first file to the final weights")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images/benchmarks.png", dpi=120)


if __name__ == "__main__":
    main()
