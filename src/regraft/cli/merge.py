"""`regraft merge`: a delta and its base become a full checkpoint."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_json

BaseOption = Annotated[
    str | None, Option("--base", help="A delta's base: a file, a folder with it, or NAME@WEIGHTS. [default: beside it]")
]


@guarded
def merge(
    delta: Annotated[Path, Argument(help="A checkpoint that holds what differs from a base.")],
    out: Annotated[Path, Option(help="The file to write, as in full.safetensors.")],
    base: BaseOption = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a full checkpoint of a delta: one that needs no base any more.

    Example: regraft merge ants.safetensors --out full.safetensors
    """
    require(out.suffix == ".safetensors", f"'{out}' does not end in .safetensors, the format that is written.")
    require(out.parent.is_dir(), f"no folder '{out.parent}' to write '{out.name}' into. Make it first.")
    require(overwrite or not out.exists(), f"'{out}' exists. Choose another --out, or pass --overwrite.")
    from regraft.checkpoint import merge as merge_delta
    from regraft.checkpoint import read_header

    path = merge_delta(delta, out, base=base)
    header = read_header(path)
    assert header is not None
    if as_json:
        say_json({"checkpoint": str(path), "tensors": len(header.digests), "digest": header.digest()})
    else:
        say(f"{path}: {len(header.digests)} tensors, digest {header.digest()}")
