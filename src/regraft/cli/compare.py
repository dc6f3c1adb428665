"""`regraft compare`: several ways to train on the same photos, and what each needs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_json, say_table
from regraft.console import ConsoleProgress

if TYPE_CHECKING:
    from regraft.trials import Comparison

KNOWN_WAYS = "scratch,probe,advised,lp-ft,gradual,all"


@guarded
def compare(
    data: Annotated[str, Argument(help="Folder with train/ and val/, with a folder per class, or of shards.")],
    model: Annotated[str, Option(help="resnet18, timm/NAME, py:FILE:Class, or a checkpoint.")] = "resnet18",
    weights: Annotated[str | None, Option(help="default, none, a registered name, or a file.")] = None,
    images: Annotated[str, Option(help="Images per class to learn from; all: all of them.")] = "5,10,20,all",
    seeds: Annotated[int, Option(help="Number of seeds: draws of photos, weights and order.", min=1)] = 3,
    ways: Annotated[str, Option(help="Ways of training to compare.")] = KNOWN_WAYS,
    epochs: Annotated[
        int | None, Option(help="Passes over the photos; from scratch four times as many. [default: 25]")
    ] = None,
    image_size: Annotated[
        int | None, Option(help="Side of the input in pixels. Smaller is faster. [default: the model's]")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for results and report; goes on where it stopped. [default: runs/DATA-compare]"),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the results of another comparison there.")] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    config: Annotated[Path | None, Option(help="TOML file with more options of `regraft train` for all ways.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare ways to train on the same photos: which needs the fewest images, and the least time?

    Example: regraft compare photos/ --model resnet18 --images 5,10,all
    """
    progress = ConsoleProgress()
    with progress.status("starting"):
        from regraft.training.config import make_config, read_config
        from regraft.trials import compare as run

    flags = {"weights": weights, "epochs": epochs, "image_size": image_size}
    options = read_config(config) if config is not None else {}
    settings = make_config({**options, **{name: value for name, value in flags.items() if value is not None}})
    folder = out if out is not None else Path("runs", f"{Path(data).resolve().stem or 'data'}-compare")
    result = run(
        model,
        data,
        images=_list(images, "--images"),
        seeds=seeds,
        ways=_list(ways, "--ways"),
        out=folder,
        overwrite=overwrite,
        trust_code=trust_code,
        config=settings,
        progress=progress,
    )
    with progress.status("writing the report"):
        from regraft.report import write_report  # here, as it imports matplotlib
        from regraft.report.comparison_page import PLOT, write_comparison_plot

        report = write_report(result, folder / "report.html")
        plot = write_comparison_plot([("", result)], folder / PLOT)
    if as_json:
        say_json({**json.loads(json.dumps(result.to_dict(), default=str)), "report": str(report), "plot": str(plot)})
        return
    _print_result(result, report)


def _list(text: str, flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    require(bool(names), f"{flag} is empty. Expected a list such as 5,10,all or scratch,probe.")
    return names


def _print_result(result: "Comparison", report: Path) -> None:
    from regraft.report.comparison_page import describe_tables

    accuracies, seconds = describe_tables(result)
    count = len(result.seeds)
    spread = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    head = ("images per class", *(way.title for way in result.ways))
    for title, rows in (
        (f"accuracy on {result.validation_count} validation photos after the last epoch, {spread}", accuracies),
        ("seconds from the first photo to the last step, without validation", seconds),
    ):
        say(title)
        say_table(head, rows, tuple(True for _ in head))
        say()
    for claim in result.headlines:
        say(f"{claim.kind:<11}{claim.text}")
    for what, why in result.left_out:
        say(f"left out   {what}: {why}")
    say(f"report     {report}")
