"""`regraft surgery`: remove, insert and append layers, freeze, and save the result."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_json, say_summary

if TYPE_CHECKING:
    from regraft.checkpoint.plan import Plan


@guarded
def surgery(
    model: Annotated[
        str | None, Argument(help="Model name (resnet18, timm/NAME, py:FILE:Class) or checkpoint file.")
    ] = None,
    layers: Annotated[list[str] | None, Argument(help="More layers to append, after those of --append.")] = None,
    plan: Annotated[Path | None, Option(help="TOML file with source, edits and freezing; options add to it.")] = None,
    weights: Annotated[str | None, Option(help="default, none, a registered name, or a file.")] = None,
    replace_stem: Annotated[
        int | None, Option(help="Replace the first layer for this number of input channels.")
    ] = None,
    truncate_after: Annotated[str | None, Option(help="Delete everything after this layer.")] = None,
    truncate_drop: Annotated[int | None, Option(help="Number of top-level layers to delete from the end.")] = None,
    remove: Annotated[list[str] | None, Option(help="Layer to remove. May be repeated.")] = None,
    replace: Annotated[list[str] | None, Option(help="LAYER=NEW, as in 'type:ReLU=GELU()'. May be repeated.")] = None,
    insert_after: Annotated[list[str] | None, Option(help="LAYER=NEW, as in 'layer2=Dropout(0.1)'.")] = None,
    insert_before: Annotated[list[str] | None, Option(help="LAYER=NEW. May be repeated.")] = None,
    append: Annotated[list[str] | None, Option(help="Layers to append, as in 'Linear(512,400)' 'ReLU()'.")] = None,
    replace_head: Annotated[int | None, Option(help="Replace the head for this number of classes.")] = None,
    freeze: Annotated[
        list[str] | None, Option(help="Layers to freeze: path, glob, re:…, type:…, children[:6].")
    ] = None,
    freeze_until: Annotated[
        str | None, Option(help="Freeze up to and including this layer, in execution order.")
    ] = None,
    seed: Annotated[int, Option(help="Random seed of the new layers' initial weights.", min=0)] = 0,
    out: Annotated[Path | None, Option(help="Output file, as in edited.safetensors.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show the layers before and after; load no weights and write nothing.")
    ] = False,
    depth: Annotated[int, Option(help="Levels of layers that --dry-run shows.", min=0)] = 1,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Edit a model: remove, insert, append and freeze layers.

    Edits are applied in the order in which the options are listed here, after those of a plan.

    Example: regraft surgery resnet18 --truncate-drop 1 --append 'Linear(512,400)' 'ReLU()' 'Linear(400,300)'
    --freeze-until layer3.0 --out edited.safetensors
    """
    options = {name: value for name, value in locals().items() if value is not None}
    require(model is not None or plan is not None, "no model given: regraft surgery resnet18 …, or --plan FILE.")
    require(not layers or bool(append), f"'{(layers or [''])[0]}' needs --append before it: --append LAYER LAYER …")
    require(dry_run or out is not None, "no output file given. Pass --out FILE.safetensors, or --dry-run to look.")
    if out is not None:
        require(out.suffix == ".safetensors", f"'{out}' does not end in .safetensors, the format that is written.")
        require(overwrite or not out.exists(), f"'{out}' exists. Choose another --out, or pass --overwrite.")
        require(out.parent.is_dir(), f"no folder '{out.parent}' to write '{out.name}' into. Create it first.")
    edited_plan = _plan(options)
    if dry_run:
        _show(edited_plan, depth, trust_code=trust_code, as_json=as_json)
    else:
        _write(edited_plan, options["out"], seed, trust_code=trust_code, as_json=as_json)


def _plan(options: dict[str, Any]) -> "Plan":
    """Read the plan, if any, and add the options to it."""
    from regraft.card import Step
    from regraft.checkpoint.plan import Freezing, Plan, read_plan

    plan = read_plan(options["plan"]) if "plan" in options else Plan(source=options["model"])
    freezing = Freezing(
        layers=(*plan.freeze.layers, *options.get("freeze", ())), until=options.get("freeze_until", plan.freeze.until)
    )
    edits = [Step.model_validate({"operation": name, "arguments": arguments}) for name, arguments in _edits(options)]
    start = {"source": options.get("model", plan.source), "weights": options.get("weights", plan.weights)}
    return plan.model_copy(update={**start, "edits": (*plan.edits, *edits), "freeze": freezing})


def _edits(options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the edits of the options, in the order in which they are applied."""
    if "replace_stem" in options:
        yield "replace_stem", {"channels": options["replace_stem"]}
    truncation = {"after": options.get("truncate_after"), "drop": options.get("truncate_drop")}
    if any(value is not None for value in truncation.values()):
        yield "truncate", {name: value for name, value in truncation.items() if value is not None}
    for path in options.get("remove", ()):
        yield "remove", {"path": path}
    for option, operation, where in (
        ("replace", "replace", "path"),
        ("insert_after", "insert", "after"),
        ("insert_before", "insert", "before"),
    ):
        for text in options.get(option, ()):
            path, separator, layer = text.partition("=")
            is_pair = bool(separator and path and layer)
            require(is_pair, f"'{text}' is not of the form LAYER=NEW, as in 'layer2=Dropout(0.1)'.")
            yield operation, {where: path, "new": layer}
    if "append" in options:
        texts = [*options["append"], *options.get("layers", ())]
        yield "append", {"layers": [int(text) if text.isdecimal() else text for text in texts]}
    if "replace_head" in options:
        yield "replace_head", {"new": options["replace_head"]}


def _show(plan: "Plan", depth: int, *, trust_code: bool, as_json: bool) -> None:
    from regraft.anatomy import summary
    from regraft.checkpoint.plan import Freezing, build_plan

    plan = plan.model_copy(update={"weights": "none"})
    unedited = plan.model_copy(update={"edits": (), "freeze": Freezing()})
    before, after = (summary(build_plan(part, trust_code=trust_code), depth=depth) for part in (unedited, plan))
    if as_json:
        say_json({"before": before.to_dict(), "after": after.to_dict(), "plan": plan.model_dump(mode="json")})
        return
    say("before")
    say_summary(before)
    say()
    say("after")
    say_summary(after)


def _write(plan: "Plan", out: Path, seed: int, *, trust_code: bool, as_json: bool) -> None:
    from regraft.anatomy.modes import preserved_randomness
    from regraft.checkpoint import save
    from regraft.checkpoint.plan import build_plan

    with preserved_randomness(seed):
        model = build_plan(plan, trust_code=trust_code)
    path = save(model, out)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    if as_json:
        say_json({"checkpoint": str(path), "parameters": total, "trainable": trainable})
    else:
        say(f"{path}: {total:,} parameters, {trainable:,} trainable")
