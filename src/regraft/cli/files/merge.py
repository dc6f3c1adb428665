"""`regraft merge`: merge a delta with its base into a full checkpoint."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, require, say, say_json

BaseOption = Annotated[
    str | None,
    Option("--base", help="Base of a delta: a file, its folder, or NAME@WEIGHTS. [default: next to the delta]"),
]


@guarded
def merge(
    delta: Annotated[Path, Argument(help="A checkpoint that stores only the differences from a base.")],
    out: Annotated[Path, Option(help="Output file, as in full.safetensors.")],
    base: BaseOption = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge a delta with its base into a full checkpoint.

    Example: regraft merge ants.safetensors --out full.safetensors
    """
    require(out.suffix == ".safetensors", f"'{out}' does not end in .safetensors, the format that is written.")
    require(out.parent.is_dir(), f"no folder '{out.parent}' to write '{out.name}' into. Create it first.")
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
