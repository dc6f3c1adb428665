"""`regraft train`: train a classifier on photos, and write a report."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from typer import Argument, Option

from regraft.cli.output import ConsoleProgress, guarded, require, say, say_classes, say_json, seconds_since_start
from regraft.train_options import TrainOption, list_options

MAX_STEM = 100  # characters of the data's name in a folder name


def with_train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of a training run before the command's own, in the signature that typer reads."""
    own = inspect.signature(command).parameters.values()
    parameters = [*map(_parameter, list_options()), *(entry for entry in own if entry.kind is not entry.VAR_KEYWORD)]
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
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    config: Annotated[Path | None, Option(help="TOML file with these options; flags take precedence.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
    **train_options: Any,
) -> None:
    """Train a classifier on a folder of photos.

    Example: regraft train photos/ --model resnet18 --epochs 20

    Resume a stopped run: regraft train --resume runs/photos-1
    """
    flags = {name: value for name, value in train_options.items() if value is not None}
    from regraft.training.config import make_config, read_config

    if resume is not None:
        known = {
            **flags,
            **({"overwrite": True} if overwrite else {}),
            **({"config": config} if config else {}),
        }
        words = ", ".join("DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in known)
        require(not known, f"--resume continues a run with its own options: leave out {words}.")
        from regraft.training.resume.saved_run import find_run_to_continue

        settings = find_run_to_continue(resume)
    else:
        options = {**read_config(config), **flags} if config is not None else flags
        require("data" in options, "no data given. Pass the folder that holds your photos: regraft train photos/")
        if "out" not in options:
            options["out"] = _free_folder(str(options["data"]))
        settings = make_config(options, "the options")

    from regraft.errors import Interrupted
    from regraft.report import write_report
    from regraft.training.fitting import fit

    progress = ConsoleProgress()
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
    assert folder is not None
    result = replace(result, seconds={"start": start_s, **result.seconds})
    trained_s = seconds_since_start()
    try:
        report = write_report(result, folder / "report.html")
    except KeyboardInterrupt as interruption:
        raise Interrupted(f"stopped by Ctrl-C. The model is kept in '{result.checkpoint}'.") from interruption
    result = replace(result, seconds={**result.seconds, "report": seconds_since_start() - trained_s})
    if as_json:
        say_json({**result.to_dict(), "report": str(report)})
        return
    _print_result(result, report)


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
        progress.say(f"report     {write_report(result, folder / 'report.html')}")


def _free_folder(data: str) -> str:
    from regraft.arguments import path_problem

    problem = path_problem(data)
    require(problem is None, f"the data is '{data[:60]}': {problem}. Give the path of a folder or a .csv table.")
    stem = Path(data).resolve().stem[:MAX_STEM] or "data"
    number = 1
    while Path("runs", f"{stem}-{number}").exists():
        number += 1
    return str(Path("runs", f"{stem}-{number}"))


def _print_result(result: Any, report: Path) -> None:
    say()
    say(f"best       epoch {result.best_epoch} of {len(result.history)}: {result.validation.headline()}")
    if result.validation.per_class:
        say()
        say_classes(result.validation)
        say()
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items())
    say(f"seconds    {sum(result.seconds.values()):.1f}: {phases}")
    say(f"model      {result.checkpoint}")
    say(f"report     {report}")
    say(f"metrics    {result.out / 'metrics.csv'}")
    say(f"options    {result.out / 'config.toml'}")
