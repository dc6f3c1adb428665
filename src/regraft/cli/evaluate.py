"""`regraft evaluate`: metrics of a saved model on labelled photos."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from regraft.cli.files.merge import BaseOption
from regraft.cli.output import (
    guarded,
    require_order,
    require_report_target,
    say,
    say_classes,
    say_json,
    seconds_since_start,
)
from regraft.console import ConsoleProgress
from regraft.train_options import Decoder


@guarded
def evaluate(
    checkpoint: Annotated[str, Argument(help="A checkpoint of `regraft train` or regraft.save.")],
    data: Annotated[str, Argument(help="Folder with a folder per class, with val/, or of shards; or a .csv table.")],
    report: Annotated[Path | None, Option(help="Write a report with pictures and plots, as in test.html.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing report.")] = False,
    heat_maps: Annotated[bool, Option(help="Show in the report where it looked in its mistakes.")] = True,
    batch_size: Annotated[int, Option(help="Photos per batch.", min=1)] = 32,
    device: Annotated[str, Option(help="auto, cpu, cuda, …")] = "auto",
    decoder: Annotated[
        Decoder | None, Option(help="auto, pillow, native or nvjpeg.  [default: as when it was trained]")
    ] = None,
    base: BaseOption = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a saved model on labelled photos.

    Example: regraft evaluate runs/photos-1/model.safetensors photos/ --report test.html
    """
    require_order("evaluate", checkpoint, [data])
    if report is not None:
        require_report_target(report, overwrite=overwrite)
    progress = ConsoleProgress()
    with progress.status("loading the model"):
        from regraft.checkpoint import load
        from regraft.training.inference import evaluate as evaluate_model

        if report is not None:
            importlib.import_module("regraft.report")  # matplotlib takes seconds, which count as a part of the start
        start_s = seconds_since_start()
        model = load(checkpoint, base=base, trust_code=trust_code)
        model_s = seconds_since_start() - start_s
    metrics = evaluate_model(model, data, batch_size=batch_size, device=device, decoder=decoder, progress=progress)
    if report is not None:
        from regraft.report import write_report

        assert metrics.scores is not None
        seconds = {"start": start_s, "model": model_s, **metrics.scores.seconds}
        scores = replace(metrics.scores, checkpoint=checkpoint, seconds=seconds)
        write_report(replace(metrics, scores=scores), report, model=model, heat_maps=heat_maps)
    if as_json:
        say_json({**metrics.to_dict(), **({"report": str(report)} if report is not None else {})})
        return
    say(metrics.headline())
    if metrics.accuracy_interval is not None:
        low, high = metrics.accuracy_interval
        say(f"95 % interval {low:.4f} to {high:.4f} (Wilson)")
        say()
        say_classes(metrics)
    if report is not None:
        say(f"report     {report}")
