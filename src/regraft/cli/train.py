"""`regraft train`: train a classifier on photos, and write a report."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from regraft.cli.output import ConsoleProgress, guarded, require, say, say_json, say_table

MAX_STEM = 100  # characters of the data's name in a folder name


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
    freeze_until: Annotated[
        str | None, Option(help="Freeze up to and including this layer, in execution order.")
    ] = None,
    unfreeze_all: Annotated[bool | None, Option("--unfreeze-all", help="Train every layer.")] = None,
    unfreeze: Annotated[
        str | None, Option(help="Gradual unfreezing in steps LAYERS:EPOCHS, as in head:3,layer4:5,all:10.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Number of epochs. [default: 25]")] = None,
    batch_size: Annotated[int | None, Option(help="Photos per batch. [default: 32]")] = None,
    optimizer: Annotated[str | None, Option(help="Optimizer, a class of torch.optim. [default: adamw]")] = None,
    lr: Annotated[float | None, Option(help="Highest learning rate. [default: depends on the trained layers]")] = None,
    head_start: Annotated[
        str | None, Option(help="Initial weights of a linear head: auto, given or ridge. [default: auto]")
    ] = None,
    backbone_lr: Annotated[
        float | None,
        Option(help="Learning rate of everything but the head. [default: as --lr; a twentieth with --unfreeze]"),
    ] = None,
    layer_decay: Annotated[float | None, Option(help="Learning-rate factor from each block to the one before.")] = None,
    weight_decay: Annotated[float | None, Option(help="Weight decay, except biases and norms. [default: 0.05]")] = None,
    schedule: Annotated[
        str | None, Option(help="Schedule: cosine (with warm-up) or constant. [default: cosine]")
    ] = None,
    augment: Annotated[
        str | None, Option(help="Augmentation: none, flip, standard or trivial. [default: flip]")
    ] = None,
    mixup: Annotated[float | None, Option(help="Mixup of photos or features, as in 0.2. [default: 0]")] = None,
    loss: Annotated[
        str | None, Option(help="cross-entropy, focal; regression: mse, l1, huber; or py:FILE:name. [default: by task]")
    ] = None,
    label_smoothing: Annotated[float | None, Option(help="Label smoothing, in [0, 1). [default: 0]")] = None,
    views: Annotated[
        int | None, Option(help="Number of random views of each photo. [default: a new one each epoch]")
    ] = None,
    cache: Annotated[
        bool | None,
        Option("--cache/--no-cache", help="Compute frozen layers once, and cache their output. [default: on]"),
    ] = None,
    cache_precision: Annotated[
        str | None, Option(help="Precision of cached features: full, bf16, fp16 or int8. [default: full]")
    ] = None,
    fast: Annotated[bool | None, Option("--fast/--exact", help="Faster, with other rounding. [default: fast]")] = None,
    precision: Annotated[str | None, Option(help="auto, fp32, bf16 or fp16. [default: auto]")] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1, … [default: auto]")] = None,
    workers: Annotated[int | None, Option(help="Loading processes. [default: automatic]")] = None,
    seed: Annotated[int | None, Option(help="Random seed. [default: 0]")] = None,
    image_size: Annotated[int | None, Option(help="Side of the input in pixels. [default: the model's]")] = None,
    validation_share: Annotated[
        float | None, Option(help="Share held out if data has no split. [default: 0.2]")
    ] = None,
    max_unreadable: Annotated[float | None, Option(help="Share of unreadable files allowed. [default: 0.1]")] = None,
    on_nan: Annotated[
        str | None, Option(help="If the loss is NaN or infinite: stop, or skip the step. [default: stop]")
    ] = None,
    checkpoint_minutes: Annotated[
        float | None, Option(help="Minutes between saved states within an epoch. [default: 5]")
    ] = None,
    keep_last: Annotated[int | None, Option(help="Number of saved states to keep. [default: 2]")] = None,
    out: Annotated[str | None, Option(help="Folder for the results. [default: runs/DATA-1, -2, …]")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing results in that folder.")] = False,
    resume: Annotated[
        Path | None, Option(help="Resume the run that stopped in this folder, with its own options.")
    ] = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    config: Annotated[Path | None, Option(help="TOML file with these options; flags take precedence.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a classifier on a folder of photos.

    Example: regraft train photos/ --model resnet18 --epochs 20

    Resume a stopped run: regraft train --resume runs/photos-1
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
