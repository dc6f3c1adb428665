"""`regraft evaluate`: metrics of a saved model on labelled photos."""

from typing import Annotated

from typer import Argument, Option

from regraft.cli.merge import BaseOption
from regraft.cli.output import guarded, say, say_json, say_table
from regraft.console import ConsoleProgress


@guarded
def evaluate(
    checkpoint: Annotated[str, Argument(help="A checkpoint of `regraft train` or regraft.save.")],
    data: Annotated[str, Argument(help="Folder with a folder per class, or with val/; or a .csv table.")],
    batch_size: Annotated[int, Option(help="Photos per batch.", min=1)] = 32,
    device: Annotated[str, Option(help="auto, cpu, cuda, …")] = "auto",
    base: BaseOption = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a saved model on labelled photos.

    Example: regraft evaluate runs/photos-1/model.safetensors photos/
    """
    from regraft.checkpoint import load
    from regraft.training.inference import evaluate as evaluate_model

    model = load(checkpoint, base=base, trust_code=trust_code)
    metrics = evaluate_model(model, data, batch_size=batch_size, device=device, progress=ConsoleProgress())
    if as_json:
        say_json(metrics.to_dict())
        return
    say(metrics.headline())
    if metrics.per_class:
        names = [entry.name for entry in metrics.per_class]
        say()
        rows = [
            (entry.name, f"{entry.precision:.3f}", f"{entry.recall:.3f}", f"{entry.f1:.3f}", str(entry.count))
            for entry in metrics.per_class
        ]
        say_table(("class", "precision", "recall", "F1", "photos"), rows, (False, True, True, True, True))
        say()
        confusion = [(name, *map(str, row)) for name, row in zip(names, metrics.confusion, strict=True)]
        say_table(("true \\ predicted", *names), confusion, (False, *(True for _ in names)))
