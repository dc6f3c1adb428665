"""`regraft predict`: classify photos."""

import csv
import io
from typing import Annotated

from typer import Argument, Option

from regraft.cli.merge import BaseOption
from regraft.cli.output import guarded, require, results, say_json, say_table
from regraft.console import ConsoleProgress


@guarded
def predict(
    checkpoint: Annotated[str, Argument(help="A checkpoint of `regraft train` or regraft.save.")],
    images: Annotated[list[str], Argument(help="Photos, or folders of photos.")],
    top: Annotated[int, Option(help="Number of classes to list for each photo.", min=1)] = 3,
    batch_size: Annotated[int, Option(help="Photos per batch.", min=1)] = 32,
    device: Annotated[str, Option(help="auto, cpu, cuda, …")] = "auto",
    base: BaseOption = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the predictions as JSON.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="Print the predictions as CSV.")] = False,
) -> None:
    """Classify photos.

    Example: regraft predict runs/photos-1/model.safetensors new_photos/ --top 3
    """
    require(not (as_json and as_csv), "--json and --csv exclude each other. Pass one of them.")
    from regraft.checkpoint import load
    from regraft.training.inference import predict as predict_images

    model = load(checkpoint, base=base, trust_code=trust_code)
    predictions = predict_images(
        model, images, top=top, batch_size=batch_size, device=device, progress=ConsoleProgress()
    )
    if as_json:
        say_json([prediction.to_dict() for prediction in predictions])
    elif as_csv:
        stream = results()
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(newline="")  # the writer ends its rows itself, which Windows would do once more
        writer = csv.writer(stream)
        writer.writerow(("path", "label", "probability") if predictions[0].label is not None else ("path", "value"))
        for prediction in predictions:
            writer.writerow(
                (prediction.path, prediction.label, prediction.probability)
                if prediction.label is not None
                else (prediction.path, prediction.value)
            )
    elif predictions[0].label is None:
        say_table(
            ("path", "value"),
            [(str(prediction.path), f"{prediction.value:.6g}") for prediction in predictions],
            (False, True),
        )
    else:
        rows = [
            (
                str(prediction.path),
                str(prediction.label),
                f"{prediction.probability:.3f}",
                ", ".join(f"{label} {probability:.3f}" for label, probability in prediction.top[1:]),
            )
            for prediction in predictions
        ]
        say_table(("path", "label", "probability", "next"), rows, (False, False, True, False))
