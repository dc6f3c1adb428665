"""`regraft diff`: what changed between two files of weights."""

from typing import Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, say, say_json


@guarded
def diff(
    a: Annotated[str, Argument(help="A checkpoint, or any file of weights.")],
    b: Annotated[str, Argument(help="Another.")],
    as_json: Annotated[bool, Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two files of weights tensor by tensor.

    Example: regraft diff base.safetensors tuned.safetensors
    """
    from regraft.checkpoint import diff as compare

    comparison = compare(a, b)
    if as_json:
        say_json(comparison.to_dict())
        return
    for line in str(comparison).splitlines():
        say(line)
