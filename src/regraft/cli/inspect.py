"""`regraft inspect`: the layers of a model or checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_code, say_json, say_summary
from regraft.console import ConsoleProgress

if TYPE_CHECKING:
    from regraft.anatomy.inputs import InputSize

LONG: Any = {"card": {"familiar": {"features", "distances"}}}  # half a million characters


@guarded
def inspect(
    model: Annotated[str, Argument(help="Model name (resnet18, timm/NAME, py:FILE:Class) or checkpoint file.")],
    depth: Annotated[int | None, Option(help="Levels of layers to show. [default: all]", min=0)] = None,
    input_size: Annotated[
        str | None,
        Option(help="Input shape with batch dimension: 1,3,224,224; several with ';'. [default: the model's own]"),
    ] = None,
    plan: Annotated[bool, Option("--plan", help="Print a plan: source, edits and freezing as TOML.")] = False,
    source: Annotated[bool, Option("--source", help="Print PyTorch source code that runs without regraft.")] = False,
    verify: Annotated[
        bool, Option("--verify", help="Also read the tensors of a checkpoint and its base, and check their digests.")
    ] = False,
    trust_code: Annotated[bool, Option("--trust-code", help="Allow the import of custom code (py:…).")] = False,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the layers of a model, their sizes, and what is frozen.

    Example: regraft inspect resnet18 --depth 1
    """
    size = _parse_size(input_size)
    with ConsoleProgress().status("starting"):  # imports PyTorch, which takes seconds
        from regraft.anatomy import summary
        from regraft.checkpoint.create import is_checkpoint
        from regraft.zoo import build

    if plan:
        say_code(_plan(model, trust_code=trust_code))
        return
    if source:
        from regraft.checkpoint import load
        from regraft.surgery import to_source

        create = load if is_checkpoint(model) else build  # with weights, as its constants become part of the source
        say_code(to_source(create(model, trust_code=trust_code)))
        return
    if is_checkpoint(model):
        _inspect_checkpoint(Path(model), size, depth, verify=verify, trust_code=trust_code, as_json=as_json)
        return
    require(not verify, f"'{model}' is not a checkpoint, so there are no digests to verify.")
    model_summary = summary(build(model, trust_code=trust_code), size, depth)
    if as_json:
        say_json(model_summary.to_dict())
    else:
        say_summary(model_summary)


def _inspect_checkpoint(
    path: Path, size: "InputSize | None", depth: int | None, *, verify: bool, trust_code: bool, as_json: bool
) -> None:
    from regraft.anatomy import summary
    from regraft.checkpoint import load_outline, read_header
    from regraft.checkpoint.delta import resolve
    from regraft.errors import TrustError

    if verify:
        resolve(path)
    try:
        model_summary, problem = summary(load_outline(path, trust_code=trust_code), size, depth), None
    except TrustError as error:  # everything except the layers can be shown without running custom code
        model_summary, problem = None, str(error)
    header = read_header(path)
    assert header is not None
    if as_json:
        layers = model_summary.to_dict() if model_summary else {"layers": [], "problem": problem}
        say_json({**layers, "checkpoint": header.model_dump(mode="json", exclude=LONG)})
        return
    for line in _describe(header):
        say(line)
    if verify:
        say("verified   all tensors match their digests")
    say()
    if model_summary is not None:
        say_summary(model_summary)
    else:
        say(f"layers     not shown: {problem}")


def _plan(model: str, *, trust_code: bool) -> str:
    from regraft.checkpoint import load_outline
    from regraft.checkpoint.create import is_checkpoint
    from regraft.checkpoint.plan import plan_of
    from regraft.zoo import build

    create = load_outline if is_checkpoint(model) else build
    return plan_of(create(model, trust_code=trust_code)).to_toml()


def _describe(header: Any) -> list[str]:
    card = header.card
    lines = [f"format     {header.format}"]
    if card.recipe:
        source = card.recipe.source
        arguments = [
            f"{name}={value}" for name, value in source.arguments.items() if isinstance(value, (int, float, str))
        ]
        lines.append(", ".join((f"source     {source.name}, weights: {source.weights}", *arguments)))
        lines += [f"edit       {step}" for step in card.recipe.steps]
    if card.task:
        lines.append(f"task       {card.task}")
    if card.classes:
        lines.append(f"classes    {len(card.classes)}: {', '.join(card.classes)}")
    if card.familiar:
        lines.append(f"unknown    can be told from the inputs of '{card.familiar.layer}' (predict --reject)")
    if card.preprocessing:
        lines.append(f"images     {card.preprocessing.summary()}")
    figures = {name: value for name, value in card.metrics.items() if isinstance(value, float)}
    if figures:
        lines.append("validation " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if header.base:
        lines.append(f"base       {header.base.kind} {header.base}; {len(header.digests)} tensors differ")
    lines.append(f"frozen     {len(header.frozen)} tensors")
    lines.append(
        "digests    " + (f"{len(header.digests)} tensors, combined {header.digest()}" if header.digests else "none")
    )
    lines.append("versions   " + ", ".join(f"{name} {version}" for name, version in header.versions.items()))
    return lines


def _parse_size(text: str | None) -> tuple[int, ...] | tuple[tuple[int, ...], ...] | None:
    if text is None:
        return None
    sizes = []
    for shape in text.split(";"):
        parts = shape.replace("x", ",").split(",")
        whole = all(part.strip().isdecimal() for part in parts)
        require(whole, f"'{text}' is not a shape. Expected integers as in 1,3,224,224.")
        sizes.append(tuple(int(part) for part in parts))
    return sizes[0] if len(sizes) == 1 else tuple(sizes)
