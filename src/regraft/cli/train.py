"""`regraft train`: photos in, a classifier and a report out."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from regraft.cli.output import ConsoleProgress, guarded, require, say, say_json, say_table

MAX_STEM = 100  # characters of the data's name in the name of a folder


@guarded
def train(
    data: Annotated[
        str | None, Argument(help="Folder with train/ and val/, folder with a folder per class, or .csv path,target.")
    ] = None,
    model: Annotated[str | None, Option(help="resnet18, timm/NAME, or py:FILE:Class. [default: resnet18]")] = None,
    weights: Annotated[
        str | None, Option(help="default, none, a registered name, or a file. [default: default]")
    ] = None,
    freeze: Annotated[
        list[str] | None, Option(help="Layers to freeze: path, glob, re:…, type:…, children[:6]. May be repeated.")
    ] = None,
    freeze_until: Annotated[str | None, Option(help="Freeze all up to and with this layer, as executed.")] = None,
    unfreeze_all: Annotated[bool | None, Option("--unfreeze-all", help="Train every layer.")] = None,
    unfreeze: Annotated[
        str | None, Option(help="Gradual unfreezing, LAYERS:EPOCHS one after the other: head:3,layer4:5,all:10.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the photos. [default: 25]")] = None,
    batch_size: Annotated[int | None, Option(help="Photos per step. [default: 32]")] = None,
    optimizer: Annotated[str | None, Option(help="A class of torch.optim. [default: adamw]")] = None,
    lr: Annotated[float | None, Option(help="Highest learning rate. [default: by what is trained]")] = None,
    head_start: Annotated[
        str | None, Option(help="First weights of a linear head: auto, given or ridge. [default: auto]")
    ] = None,
    backbone_lr: Annotated[float | None, Option(help="Of everything but the head. [default: as --lr]")] = None,
    layer_decay: Annotated[float | None, Option(help="Factor from each block's rate to the one before it.")] = None,
    weight_decay: Annotated[float | None, Option(help="Of weights, not of biases and norms. [default: 0.05]")] = None,
    schedule: Annotated[str | None, Option(help="cosine (with warm-up) or constant. [default: cosine]")] = None,
    augment: Annotated[str | None, Option(help="none, flip, standard or trivial. [default: flip]")] = None,
    mixup: Annotated[float | None, Option(help="Mix photos or their features: 0.2 a little. [default: 0]")] = None,
    loss: Annotated[
        str | None, Option(help="cross-entropy, focal; numbers: mse, l1, huber; or py:FILE:name. [default: by data]")
    ] = None,
    label_smoothing: Annotated[float | None, Option(help="Of the cross-entropy. [default: 0]")] = None,
    views: Annotated[
        int | None, Option(help="Random versions of each photo to compute once. [default: a new one each epoch]")
    ] = None,
    cache: Annotated[
        bool | None, Option("--cache/--no-cache", help="Compute what is frozen once. [default: on]")
    ] = None,
    cache_precision: Annotated[
        str | None, Option(help="How precisely that is kept: full, bf16, fp16 or int8. [default: full]")
    ] = None,
    fast: Annotated[bool | None, Option("--fast/--exact", help="Allow other rounding. [default: fast]")] = None,
    precision: Annotated[str | None, Option(help="auto, fp32, bf16 or fp16. [default: auto]")] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1, … [default: auto]")] = None,
    workers: Annotated[int | None, Option(help="Loading processes. [default: as useful]")] = None,
    seed: Annotated[int | None, Option(help="Decides everything random. [default: 0]")] = None,
    image_size: Annotated[int | None, Option(help="Side of the network's input, in pixels. [default: its own]")] = None,
    validation_share: Annotated[float | None, Option(help="Kept where the data has no split. [default: 0.2]")] = None,
    max_unreadable: Annotated[float | None, Option(help="Share of unreadable files allowed. [default: 0.1]")] = None,
    on_nan: Annotated[
        str | None, Option(help="A loss that is no number: stop, or skip the step. [default: stop]")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None, Option(help="Minutes between states within an epoch. [default: 5]")
    ] = None,
    keep_last: Annotated[int | None, Option(help="States that are kept while it trains. [default: 2]")] = None,
    out: Annotated[str | None, Option(help="Folder for the results. [default: runs/DATA-1, -2, …]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace results that are in that folder.")] = False,
    resume: Annotated[
        Path | None, Option(help="Continue the run that stopped in this folder, with its own options.")
    ] = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Import a class or loss of your own (py:…).")] = False,
    config: Annotated[Path | None, Option(help="TOML file with these options; flags win.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a classifier on a folder of photos.

    Example: regraft train photos/ --model resnet18 --epochs 20

    A run that was stopped goes on with: regraft train --resume runs/photos-1
    """
    flags = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("overwrite", "resume", "trust_code", "config", "as_json")
    }
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
    result = fit(
        settings.model,
        settings.data,
        config=settings,
        overwrite=overwrite,
        resume=resume is not None,
        trust_code=trust_code,
        progress=progress,
    )
    assert result.out is not None
    try:
        report = write_report(result, result.out / "report.html")
    except KeyboardInterrupt as interruption:
        raise Interrupted(f"stopped by Ctrl-C. The model is kept in '{result.checkpoint}'.") from interruption
    if as_json:
        say_json({**result.to_dict(), "report": str(report)})
        return
    _print_result(result, report)


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
        rows = [
            (entry.name, f"{entry.precision:.3f}", f"{entry.recall:.3f}", f"{entry.f1:.3f}", str(entry.count))
            for entry in result.validation.per_class
        ]
        say_table(("class", "precision", "recall", "F1", "photos"), rows, (False, True, True, True, True))
        say()
    say("seconds    " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items()))
    say(f"model      {result.checkpoint}")
    say(f"report     {report}")
    say(f"metrics    {result.out / 'metrics.csv'}")
    say(f"options    {result.out / 'config.toml'}")
