"""`regraft advise`: which layers to freeze, and which network to take."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from regraft.cli.output import VerboseOption, guarded, require, require_report_target, say, say_json, say_table
from regraft.cli.train import choose_train_options
from regraft.console import ConsoleProgress
from regraft.train_options import list_options

if TYPE_CHECKING:
    from regraft.advice import Advice, Ranking

# What the photos and the network are, and what the training after it will be; all as for `regraft train`.
OPTIONS = (
    "weights", "rename", "match", "entry", "accept", "epochs", "batch_size", "augment", "views", "cache",
    "cache_precision", "fast", "precision", "decoder", "device", "seed", "image_size", "validation_share", "loss",
)  # fmt: skip


@guarded
@choose_train_options(*OPTIONS)
def advise(
    words: Annotated[
        list[str],
        Argument(metavar="MODEL... DATA", help="One network or several, as for `train --model`; then the data."),
    ],
    *,
    layers: Annotated[
        list[str] | None, Option("--layer", help="Layer after which the frozen part may end. May be repeated.")
    ] = None,
    budget: Annotated[
        str | None, Option(help="Time for the advice and the training after it, as in 90s, 10m or 2h.")
    ] = None,
    report: Annotated[Path | None, Option(help="Write a page with the table and a plot, as in advice.html.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing report.")] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    verbose: VerboseOption = False,
    as_json: Annotated[bool, Option("--json", help="Print the advice as JSON.")] = False,
    **train_options: Any,
) -> None:
    """Advise on the layers to freeze for your photos, after one look at each of them.

    Example: regraft advise resnet18 photos/
    """
    require(len(words) > 1, "one word is too few. Name a network and the data: regraft advise resnet18 photos/")
    *models, data = words
    if report is not None:
        require_report_target(report, overwrite=overwrite)
    progress = ConsoleProgress(verbose=verbose)
    with progress.status("starting"):  # imports PyTorch, which takes seconds
        from regraft.advice.advise_model import advise as advise_model

    advice = advise_model(
        models[0] if len(models) == 1 else models,
        data,
        budget=budget,
        layers=layers or None,
        trust_code=trust_code,
        progress=progress,
        **{name: value for name, value in train_options.items() if value is not None},
    )
    if report is not None:
        from regraft.report import write_report

        write_report(advice, report)
    if as_json:
        say_json({**advice.to_dict(), **({"report": str(report)} if report is not None else {})})
        return
    _print_advice(advice)
    if advice.flags:
        say(f"next       {_train_command(advice, data, train_options, trust_code=trust_code)}")
    if report is not None:
        say(f"report     {report}")


def _print_advice(advice: "Advice | Ranking") -> None:
    from regraft.advice.result import RANKING_RIGHT, RIGHT, Ranking

    if isinstance(advice, Ranking):
        head, *rows = advice.table()
        say_table(head, rows, RANKING_RIGHT)
        say()
        head, *rows = advice.best.table()
    else:
        head, *rows = advice.table()
    say_table(head, rows, RIGHT)
    say()
    for line in advice.conclusions():
        say(line)


def _train_command(advice: "Advice | Ranking", data: str, options: dict[str, Any], *, trust_code: bool) -> str:
    """Return the command that trains as advised, with the options that the advice was asked with."""
    from regraft.advice import Advice

    best = advice if isinstance(advice, Advice) else advice.best
    words = ["regraft", "train", data, "--model", best.model]
    for entry in list_options():
        value = options.get(entry.name)
        if isinstance(value, bool):
            words.append(entry.flags.split("/")[0 if value else -1])
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (entry.flags, str(item))]
        elif value is not None:
            words += [entry.flags, str(value)]
    trust = ["--trust-code"] if trust_code else []
    return f"{shlex.join([*words, *trust])} {best.flags}"
