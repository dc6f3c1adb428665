"""pydantic models whose constructors raise errors of regraft."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from regraft.errors import ConfigError, nearest

MAX_SHOWN = 60  # characters of a value in a message


class CheckedFields(BaseModel):
    """A pydantic model for users to construct: a wrong field raises a `ConfigError`.

    Only the constructor does so. Validation of data (`model_validate`, a field that is a model) still raises pydantic's
    `ValidationError`, to which the reader of the data adds the file and the place.
    """

    if not TYPE_CHECKING:  # type checkers see the fields, which a signature would hide

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(f"{type(self).__name__}: {explain(error, type(self))}.") from error

        __init__.__pydantic_base_init__ = True  # pydantic's flag for constructors that validation may skip


def explain(
    error: ValidationError, kind: type[BaseModel], help_text: str = "", name_field: Callable[[str], str] = repr
) -> str:
    """Describe the wrong fields of a model; for an unknown name, suggest similar ones.

    Args:
        error: The error of pydantic.
        kind: The class of the model.
        help_text: Advice for an unknown name without similar ones.
        name_field: Writes the name of a field, in quotes unless it says otherwise.
    """
    return "; ".join(_explain(problem, kind, help_text, name_field) for problem in error.errors())


def _explain(problem: Any, kind: type[BaseModel], help_text: str, name_field: Callable[[str], str]) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        other = getattr(kind, "OTHER_WORDS", {}).get(name)
        hint = other or nearest(name, kind.model_fields) or help_text or f"It has {', '.join(kind.model_fields)}."
        return f"no option '{name}'. {hint}".rstrip(".")
    field = kind.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    choices = get_args(field.annotation) if field is not None and problem["type"] == "literal_error" else ()
    if choices:
        known = [str(choice) for choice in choices]
        expected = f"expected one of {', '.join(known)}. {nearest(str(problem['input']), known)}".rstrip(". ")
    elif problem["type"] == "missing":
        return f"{name_field(name)} is missing"
    elif problem["type"] == "tuple_type":
        expected = 'expected a list, as in ["layer1", "layer2"]'
    else:
        expected = problem["msg"].removeprefix("Value error, ")
        expected = expected[:1].lower() + expected[1:]
    return f"{name_field(name)} cannot be {_shown(problem['input'])}: {expected}" if name else expected


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # of an object of the user's own, or of a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"
