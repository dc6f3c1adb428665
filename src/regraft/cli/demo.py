"""`regraft demo`: transfer learning against training from scratch, on the digits of scikit-learn."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from regraft.cli.output import guarded, require, say, say_json, say_table
from regraft.console import ConsoleProgress


@guarded
def demo(
    out: Annotated[Path, Option(help="Folder for images, checkpoint, plots and report.")] = Path("regraft-demo"),
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the contents of that folder.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare four ways to learn from few images, on digits.

    A network learns the digits 0-4, and then 5-9 from 1 to 20 images each, with four methods.

    Example: regraft demo --out regraft-demo
    """
    require(overwrite or not out.exists(), f"'{out}' exists. Choose another --out, or pass --overwrite.")
    from regraft.demo import run_demo, write_demo_report

    out.mkdir(parents=True, exist_ok=True)
    result = run_demo(out, progress=ConsoleProgress())
    report = write_demo_report(result, out)
    if as_json:
        say_json({**result.to_dict(), "report": str(report)})
        return
    _print_table("accuracy on held-out images, mean ± standard deviation of 5 seeds", result, "accuracy", "{:.3f}")
    _print_table("seconds to train and measure", result, "duration", "{:.2f}")
    runs = sum(len(outcome.accuracies) for outcome in result.outcomes)
    say(f"{runs} runs in {result.seconds:.0f} seconds, measured on {result.held_out} images")
    say(f"report     {report}")


def _print_table(title: str, result: Any, figure: str, form: str) -> None:
    methods = list(dict.fromkeys(outcome.method for outcome in result.outcomes))
    figures = {(outcome.method, outcome.shots): getattr(outcome, figure) for outcome in result.outcomes}
    rows = [
        (str(shots), *(" ± ".join(form.format(value) for value in figures[method, shots]) for method in methods))
        for shots in dict.fromkeys(outcome.shots for outcome in result.outcomes)
    ]
    say(title)
    say_table(("images per class", *methods), rows, (True, *(True for _ in methods)))
    say()
