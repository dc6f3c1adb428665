"""`regraft diff`: differences between two weights files."""

from typing import Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, say, say_json


@guarded
def diff(
    a: Annotated[str, Argument(help="A checkpoint, or any weights file.")],
    b: Annotated[str, Argument(help="The file to compare with.")],
    as_json: Annotated[bool, Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two weights files tensor by tensor.

    Example: regraft diff base.safetensors tuned.safetensors
    """
    from regraft.checkpoint import diff as compare

    comparison = compare(a, b)
    if as_json:
        say_json(comparison.to_dict())
        return
    for line in str(comparison).splitlines():
        say(line)
