"""All options of a training run with their defaults, as one value that can be saved as TOML."""

import textwrap
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, ValidationError, field_validator, model_validator

from regraft.checkpoint.file.atomic import atomic_write
from regraft.errors import ConfigError
from regraft.fields import CheckedFields, explain
from regraft.train_options import TrainOptions, list_options
from regraft.wording import for_caller, option

HEAD_LR = 1e-2
FINE_TUNE_LR = 5e-4
SCRATCH_LR = 2e-3


class TrainConfig(CheckedFields, TrainOptions):
    """The options of `fit` and of `regraft train`, where the same names have dashes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    OTHER_WORDS: ClassVar[dict[str, str]] = {
        **{alias: f"Write {option.name}=…" for option in list_options() for alias in option.text.aliases},
        "pretrained": 'Write weights="default", or "none" for False',
        "verbose": "Write progress=False for silence; True is the default",
        "validation_data": "Pass data as a pair: (train, validation)",
    }

    @model_validator(mode="before")
    @classmethod
    def _renames_options_of_0_1(cls, values: Any) -> Any:
        if isinstance(values, dict) and "head_start" in values and "head" not in values:
            start = values["head_start"]
            rest = {name: value for name, value in values.items() if name != "head_start"}
            return {**rest, "head": "steps" if start == "auto" else start}
        return values

    @field_validator("weights", mode="before")
    @classmethod
    def _names_weights(cls, weights: Any) -> Any:
        if weights is None:
            return "none"
        return str(weights) if isinstance(weights, Enum) else weights

    @field_validator("data", "model", "weights", "out", mode="before")
    @classmethod
    def _path_as_text(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @field_validator("data", "out", mode="before")
    @classmethod
    def _takes_paths(cls, path: Any) -> Any:
        return str(path) if isinstance(path, Path) else path

    @field_validator("data", "model", "weights", "loss", "out")
    @classmethod
    def _fits_a_toml_file(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError("it has bytes that are no UTF-8, which config.toml cannot hold; rename it") from error
            if "\0" in text:
                raise ValueError("it has a null byte, which no file's name can hold")
        return text

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the options that are not at their defaults, which pydantic writes."""
        defaults = type(self)()
        yield from ((name, value) for name, value in self if value != getattr(defaults, name))

    def updated(self, **options: Any) -> "TrainConfig":
        """Return this configuration with other values, checked.

        Raises:
            ConfigError: An option is unknown or has an invalid value.
        """
        return make_config({**self.model_dump(exclude_unset=True), **options})


TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n\n    Attributes:\n" + "\n".join(
    textwrap.fill(f"{option.name}: {option.description}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
    for option in list_options()
)


def make_config(values: dict[str, Any], file: Path | None = None) -> TrainConfig:
    """Check a dict of options and return the configuration; errors name the `file` that the options come from.

    Raises:
        ConfigError: An option is unknown (the nearest names are shown) or has an invalid value.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        where, name_field = ("", _quoted_option) if file is None else (f"'{file}': ", repr)
        problems = explain(error, TrainConfig, "`regraft train --help` lists all.", name_field)
        raise ConfigError(f"{where}{problems}.") from error


def _quoted_option(name: str) -> str:
    return for_caller(python=repr(name), command=option(name))


def read_config(path: Path) -> dict[str, Any]:
    """Read the options in a TOML file.

    Raises:
        ConfigError: The file is missing or malformed, or one of its options is unknown or invalid.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file '{path}' (looked from {Path.cwd()}). Give the path of a .toml file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not TOML: {error}.") from error
    make_config(values, path)
    return values


def write_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration as TOML; options without a value are left out."""
    import tomli_w

    with atomic_write(path, flush=False) as temporary:
        temporary.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, mode="json")), encoding="utf-8")
