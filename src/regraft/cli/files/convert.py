"""`regraft convert`: convert weights of other libraries to safetensors."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_json, say_lines
from regraft.console import ConsoleProgress


@guarded
def convert(
    file: Annotated[Path, Argument(help="A weights file: .pth, .ckpt, .npz, TorchScript, an index of shards, …")],
    out: Annotated[Path, Argument(help="Output file, as in weights.safetensors.")],
    model: Annotated[
        str | None,
        Option(help="Model name (resnet18, timm/NAME, py:FILE:Class), to write a checkpoint with its recipe."),
    ] = None,
    rename: Annotated[
        list[str] | None, Option(help=r"OLD=NEW, regular expressions, as in 'encoder\.(.*)=backbone.\1'. Repeatable.")
    ] = None,
    match: Annotated[str, Option(help="names, or shapes: match by order and shape if names do not fit.")] = "names",
    entry: Annotated[
        str | None, Option("--entry", "--ema", help="Key of the state dict to use, as in ema or teacher.")
    ] = None,
    accept: Annotated[str, Option(help="Minimum confidence of a match: certain, likely or ambiguous.")] = "certain",
    tensors_only: Annotated[
        bool, Option("--tensors-only", help="Extract the tensors of a pickled module, without running its code.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the mapping; write nothing.")] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert files of weights to safetensors, running no code.

    Example: regraft convert resnet18_ddp.pth resnet18.safetensors --model resnet18
    """
    if accept == "guess":
        ConsoleProgress().say("--accept guess is deprecated. Use --accept ambiguous.")
        accept = "ambiguous"
    for name, value, known in (
        ("match", match, ("names", "shapes")),
        ("accept", accept, ("certain", "likely", "ambiguous")),
    ):
        require(value in known, f"--{name} is '{value}', expected {' or '.join(known)}.")
        require(model is not None or value == known[0], f"--{name} {value} needs a network to fit: --model NAME.")
    require(out.suffix == ".safetensors", f"'{out}' does not end in .safetensors, the format that is written.")
    require(dry_run or overwrite or not out.exists(), f"'{out}' exists. Choose another name, or pass --overwrite.")
    require(out.parent.is_dir(), f"no folder '{out.parent}' to write '{out.name}' into. Create it first.")
    from regraft.checkpoint import convert as write
    from regraft.checkpoint.matching.naming import parse_rules

    options: dict[str, Any] = {"match": match, "accept": accept, "entry": entry, "tensors_only": tensors_only}
    report = write(
        file, out, model=model, rename=parse_rules(rename or []), dry_run=dry_run, trust_code=trust_code, **options
    )
    if as_json:
        say_json({"out": None if dry_run else str(out), **report.to_dict()})
        return
    say_lines(str(report))
    if not dry_run:
        say(f"{out}: {len(report.loaded)} tensors")
