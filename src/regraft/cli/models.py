"""`regraft models`: the names of available models."""

from typing import Annotated

from typer import Argument, Option

from regraft.cli.output import guarded, say, say_json


@guarded
def models(
    pattern: Annotated[str, Argument(help="Part of a name, or a glob pattern.")] = "*",
    as_json: Annotated[bool, Option("--json", help="Print the names as JSON.")] = False,
) -> None:
    """List the available models.

    Example: regraft models 'timm/vit_*'
    """
    from regraft.errors import ModelError, nearest
    from regraft.zoo import list_models

    names = list_models(pattern if set("*?[") & set(pattern) else f"*{pattern}*")
    if not names:
        raise ModelError(f"no model matches '{pattern}'. {nearest(pattern, list_models())}".rstrip())
    if as_json:
        say_json(names)
    else:
        for name in names:
            say(name)
