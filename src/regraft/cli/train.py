"""`regraft train`: train a classifier on photos, and write a report."""

import contextlib
import inspect
import math
import shlex
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from typer import Argument, Option

from regraft.cli.output import (
    VerboseOption,
    guarded,
    require,
    say,
    say_classes,
    say_json,
    say_lines,
    seconds_since_start,
)
from regraft.console import ConsoleProgress
from regraft.train_options import TrainOption, list_options

if TYPE_CHECKING:
    from regraft.training.config import TrainConfig
    from regraft.training.metrics import Metrics
    from regraft.training.result import FitResult

MAX_STEM = 100  # characters of the data's name in a folder name


def with_train_options(command: Callable[..., None], names: Collection[str] | None = None) -> Callable[..., None]:
    """Put the options of a training run, or those of some names, into the signature that typer reads.

    They come before the command's own keyword-only parameters.
    """
    own = inspect.signature(command).parameters.values()
    options = [_parameter(option) for option in list_options() if names is None or option.name in names]
    first = [entry for entry in own if entry.kind is entry.POSITIONAL_OR_KEYWORD]
    parameters = [*first, *options, *(entry for entry in own if entry.kind is entry.KEYWORD_ONLY)]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _parameter(option: TrainOption) -> inspect.Parameter:
    """Return a training option as typer declares one: None unless given, so that a file with options can follow."""
    help_text, kind = option.text.help, option.type
    if get_origin(kind) is tuple:
        help_text, kind = f"{help_text} May be repeated.", list[str]
    elif get_origin(kind) is Literal:
        kind = str  # checked by `TrainConfig`, whose error names the choices
    if option.default_text:
        help_text += f" [default: {option.default_text}]"
    declaration = Argument(help=help_text) if option.name == "data" else Option(option.flags, help=help_text)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, declaration],
    )


@guarded
@with_train_options
def train(
    *,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing results in that folder.")] = False,
    resume: Annotated[
        Path | None, Option(help="Resume the run that stopped in this folder, with its own options.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show how the weights file fits and what would be trained; train nothing.")
    ] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    heat_maps: Annotated[bool, Option(help="Show in the report where it looked in its mistakes.")] = True,
    config: Annotated[Path | None, Option(help="TOML file with these options; flags take precedence.")] = None,
    verbose: VerboseOption = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
    **train_options: Any,
) -> None:
    """Train a classifier on a folder of photos.

    Example: regraft train photos/ --model resnet18 --epochs 20

    Resume a stopped run: regraft train --resume runs/photos-1
    """
    flags = {name: value for name, value in train_options.items() if value is not None}
    progress = ConsoleProgress(verbose=verbose)
    with progress.status("starting"):  # imports PyTorch, which takes seconds
        settings = _settings(flags, resume, config, overwrite=overwrite, dry_run=dry_run)
        from regraft.errors import Interrupted
        from regraft.training.fitting import fit

    if dry_run:
        _preview(settings, progress, trust_code=trust_code, as_json=as_json)
        return
    start_s = seconds_since_start()
    try:
        result = fit(
            settings.model,
            settings.data,
            config=settings,
            overwrite=overwrite,
            resume=resume is not None,
            trust_code=trust_code,
            progress=progress,
        )
    except (Exception, KeyboardInterrupt) as error:
        _report_so_far(error, start_s, progress)
        raise
    folder = result.out
    if folder is None:  # another rank of the same run, which writes and reports
        return
    result = replace(result, seconds={"start": start_s, **result.seconds})
    trained_s = seconds_since_start()
    try:
        with progress.status("writing the report"):
            from regraft.report import write_report  # here, as it imports matplotlib

            report = write_report(result, folder / "report.html", heat_maps=heat_maps)
    except KeyboardInterrupt as interruption:
        raise Interrupted(f"stopped by Ctrl-C. The model is kept in '{result.checkpoint}'.") from interruption
    result = replace(result, seconds={**result.seconds, "report": seconds_since_start() - trained_s})
    if as_json:
        say_json({**result.to_dict(), "report": str(report)})
        return
    _print_result(result, report, verbose=verbose)


def _settings(
    flags: dict[str, Any], resume: Path | None, config: Path | None, *, overwrite: bool, dry_run: bool
) -> "TrainConfig":
    """Return the options of the run: those of the flags and a file, or of the run that is continued."""
    from regraft.training.config import make_config, read_config

    if resume is None:
        options = {**read_config(config), **flags} if config is not None else flags
        require("data" in options, "no data given. Pass the folder that holds your photos: regraft train photos/")
        if "out" not in options:
            options["out"] = _free_folder(str(options["data"]))
        return make_config(options)
    own = {"overwrite": overwrite, "config": config, "dry_run": dry_run}
    known = {**flags, **{name: value for name, value in own.items() if value}}
    words = ", ".join("DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in known)
    require(not known, f"--resume continues a run with its own options: leave out {words}.")
    from regraft.training.resume.saved_run import find_run_to_continue

    return find_run_to_continue(resume)


def _preview(settings: "TrainConfig", progress: ConsoleProgress, *, trust_code: bool, as_json: bool) -> None:
    """Print how a weights file fits the network, and what would be trained."""
    from regraft.checkpoint import create_model
    from regraft.checkpoint.create import weights_path
    from regraft.errors import CheckpointError
    from regraft.training.fitting import preview
    from regraft.training.heads.model_for_data import creation_options

    answer: dict[str, Any] = {"weights": None}
    if weights_path(settings.weights) is not None:
        report = create_model(settings.model, dry_run=True, **creation_options(settings, trust_code=trust_code))
        answer["weights"] = report.to_dict()
        if not as_json:
            say_lines(str(report))
            say()
    if as_json:
        say_json(answer)
    try:
        preview(settings, progress, trust_code=trust_code)
    except CheckpointError as error:  # the answer to a dry run, not a failure of it
        progress.say(f"would fail {error}")


def _report_so_far(error: BaseException, start_s: float, progress: ConsoleProgress) -> None:
    """Write the report of a run that was stopped, of its best epoch so far, if there is one."""
    from regraft.errors import RegraftError
    from regraft.report import write_report
    from regraft.training.result import FitResult

    result = getattr(error, "result", None)
    if not isinstance(result, FitResult) or (folder := result.out) is None:
        return
    result = replace(result, seconds={"start": start_s, **result.seconds})
    progress.say("stopping   writing the report of the best epoch so far; Ctrl-C skips it")
    with contextlib.suppress(RegraftError, OSError, KeyboardInterrupt):  # it says less than the error that follows
        progress.say(f"report     {write_report(result, folder / 'report.html', heat_maps=False)}")


def _free_folder(data: str) -> str:
    from regraft.arguments import path_problem

    problem = path_problem(data)
    require(problem is None, f"the data is '{data[:60]}': {problem}. Give the path of a folder or a .csv table.")
    stem = Path(data).resolve().stem[:MAX_STEM] or "data"
    number = 1
    while Path("runs", f"{stem}-{number}").exists():
        number += 1
    return str(Path("runs", f"{stem}-{number}"))


def _print_result(result: "FitResult", report: Path, *, verbose: bool) -> None:
    metrics = result.validation
    say()
    say(f"result     {metrics.headline()}, after epoch {result.best_epoch}")
    say(f"           on {metrics.count:,} photos held back{_uncertainty(metrics)}")
    if verbose:
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items())
        say(f"seconds    {sum(result.seconds.values()):.1f}: {phases}")
        if metrics.per_class:
            say()
            say_classes(metrics)
            say()
    say(f"model      {result.checkpoint}")
    say(f"report     {report}")
    from regraft.card import card_of

    recipe = card_of(result.model).recipe
    trust = " --trust-code" if recipe is not None and "py:" in recipe.model_dump_json() else ""
    say(f"next       regraft predict {shlex.quote(str(result.checkpoint))} PHOTO.jpg{trust}")


def _uncertainty(metrics: "Metrics") -> str:
    if metrics.accuracy_interval is None:
        return ""
    low, high = metrics.accuracy_interval
    return f"; expect {math.floor(100 * low)}% to {math.ceil(100 * high)}% on others like them"
