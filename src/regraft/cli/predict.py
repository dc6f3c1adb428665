"""`regraft predict`: classify photos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from regraft.cli.files.merge import BaseOption
from regraft.cli.output import (
    csv_text,
    guarded,
    json_text,
    require,
    require_order,
    say,
    say_table,
    say_text,
    write_text,
)
from regraft.console import ConsoleProgress
from regraft.train_options import Decoder

DEFAULT_TOP = 3
OWN_COLUMNS = ("path", "label", "probability")
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins with one for a formula


@guarded
def predict(
    checkpoint: Annotated[str, Argument(help="A checkpoint of `regraft train` or regraft.save.")],
    images: Annotated[
        list[str], Argument(help="Photos, folders of photos or shards, or patterns such as 'new/*.jpg'.")
    ],
    top: Annotated[
        int | None, Option(help="Number of classes to list for each photo.  [default: 3; all in a CSV]", min=1)
    ] = None,
    reject: Annotated[
        float | None,
        Option(
            help="Label photos 'unknown' that resemble the training photos less than this share of others, as in 0.02."
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="Write the predictions into this .csv or .json file.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    batch_size: Annotated[int, Option(help="Photos per batch.", min=1)] = 32,
    device: Annotated[str, Option(help="auto, cpu, cuda, …")] = "auto",
    decoder: Annotated[
        Decoder | None, Option(help="auto, pillow, native or nvjpeg.  [default: as when it was trained]")
    ] = None,
    base: BaseOption = None,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the predictions as JSON.")] = False,
    as_csv: Annotated[
        bool, Option("--csv", help="Print the predictions as CSV, with a column for each class.")
    ] = False,
) -> None:
    """Classify photos.

    Example: regraft predict runs/photos-1/model.safetensors new_photos/ --out new.csv
    """
    require_order("predict", checkpoint, images)
    require(not (as_json and as_csv), "--json and --csv exclude each other. Pass one of them.")
    if out is not None:
        _check_file(out, overwrite=overwrite)
    progress = ConsoleProgress()
    with progress.status("loading the model"):
        from regraft.card import card_of
        from regraft.checkpoint import load
        from regraft.training.inference import predict as predict_images

        model = load(checkpoint, base=base, trust_code=trust_code)
    classes = card_of(model).classes or ()
    is_csv = as_csv or (out is not None and out.suffix.lower() == ".csv")
    predictions = predict_images(
        model,
        images,
        top=len(classes) if is_csv and classes else top or DEFAULT_TOP,
        reject=reject,
        batch_size=batch_size,
        device=device,
        decoder=decoder,
        progress=progress,
    )

    def text(*, is_csv: bool) -> str:
        if is_csv:
            return csv_text(_rows(predictions, classes, top))
        return json_text([_shortened(prediction.to_dict(), top or DEFAULT_TOP) for prediction in predictions])

    if out is not None:
        write_text(out, text(is_csv=out.suffix.lower() == ".csv"))
    if as_json or as_csv:
        say_text(text(is_csv=as_csv))
    elif out is not None:
        say(f"predictions of {len(predictions)} photos: {out}")
    else:
        _say_predictions(predictions, top or DEFAULT_TOP)


def _check_file(out: Path, *, overwrite: bool) -> None:
    known = out.suffix.lower() in (".csv", ".json")
    require(known, f"--out '{out}' ends in '{out.suffix}', expected a file that ends in .csv or .json.")
    require(out.parent.is_dir(), f"no folder '{out.parent}' to write '{out.name}' into. Create it first.")
    require(not out.is_dir(), f"--out '{out}' is a folder. Give the path of a file.")
    require(overwrite or not out.exists(), f"'{out}' exists. Choose another --out, or pass --overwrite.")


def _say_predictions(predictions: Sequence[Any], top: int) -> None:
    if predictions[0].label is None:
        numbers = [(str(one.path), f"{one.value:.6g}") for one in predictions]
        say_table(("path", "value"), numbers, (False, True))
        return
    rows = [
        (
            str(one.path),
            str(one.label),
            f"{one.probability:.3f}" if one.probability is not None else "",
            ", ".join(f"{label} {share:.3f}" for label, share in one.top[one.probability is not None : top]),
        )
        for one in predictions
    ]
    say_table(("path", "label", "probability", "next"), rows, (False, False, True, False))


def _shortened(value: dict[str, Any], top: int) -> dict[str, Any]:
    return {**value, "top": value["top"][:top]} if "top" in value else value


def _rows(predictions: Sequence[Any], classes: Sequence[str], top: int | None) -> list[list[Any]]:
    """Return the table of the predictions: a column for each class, or the `top` labels of each photo in order."""
    if not classes:
        return [["path", "value"], *([_path_cell(one.path), one.value] for one in predictions)]
    if top is not None:
        numbers = range(2, min(top, len(classes)) + 1)
        head = [*OWN_COLUMNS, *(f"{name}_{number}" for number in numbers for name in OWN_COLUMNS[1:])]
        ranked = ((one.path, one.top[:top]) for one in predictions)
        return [
            head,
            *(
                [_path_cell(path), *(cell for label, share in best for cell in (_cell(label), share))]
                for path, best in ranked
            ),
        ]
    names = [_cell(f"{name} (class)" if name in OWN_COLUMNS else name) for name in classes]
    table: list[list[Any]] = [[*OWN_COLUMNS, *names]]
    for one in predictions:
        shares = dict(one.top)
        table.append([_path_cell(one.path), _cell(one.label), one.probability, *(shares[name] for name in classes)])
    return table


def _path_cell(path: object) -> str:
    """Return a path as a cell of a table: the same file, in words that no spreadsheet takes for a formula."""
    text = str(path)
    return f"./{text}" if text.startswith(FORMULA_SIGNS) else text


def _cell(text: str) -> str:
    """Return a class name as a cell of a table: after an apostrophe if a spreadsheet would take it for a formula."""
    is_number = text.lstrip("+-").replace(".", "", 1).isdecimal()
    return f"'{text}" if text.startswith(FORMULA_SIGNS) and not is_number else text
