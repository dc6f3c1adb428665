"""Plain values with checked fields, whose constructors raise errors of regraft."""

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from regraft.errors import ConfigError, nearest

MAX_SHOWN = 60  # characters of a value in a message


class CheckedFields(BaseModel):
    """A pydantic model that a user may construct: a field that is wrong is a `ConfigError`.

    Only the constructor itself does so: what pydantic validates from data (`model_validate`, a field that is a model)
    still raises its own `ValidationError`, to which whoever reads the data adds where it stands.
    """

    if not TYPE_CHECKING:  # type checkers see the fields, which a signature would hide

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(f"{type(self).__name__}: {explain(error, type(self))}.") from error

        __init__.__pydantic_base_init__ = True  # pydantic's mark of constructors that validation may pass by


def explain(error: ValidationError, kind: type[BaseModel], help_text: str = "") -> str:
    """Describe what is wrong with the fields of a model, and which were meant where a name is unknown.

    Args:
        error: What pydantic said.
        kind: The class of the model.
        help_text: What to do about a name that is near none.
    """
    return "; ".join(_explain(problem, kind, help_text) for problem in error.errors())


def _explain(problem: Any, kind: type[BaseModel], help_text: str) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        other = getattr(kind, "OTHER_WORDS", {}).get(name)
        hint = other or nearest(name, kind.model_fields) or help_text or f"It has {', '.join(kind.model_fields)}."
        return f"no option '{name}'. {hint}".rstrip(".")
    field = kind.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    choices = get_args(field.annotation) if field is not None and problem["type"] == "literal_error" else ()
    if choices:
        expected = f"expected one of {', '.join(map(str, choices))}"
    elif problem["type"] == "missing":
        return f"'{name}' is missing"
    elif problem["type"] == "tuple_type":
        expected = 'expected a list, as in ["layer1", "layer2"]'
    else:
        expected = problem["msg"].removeprefix("Value error, ")
        expected = expected[:1].lower() + expected[1:]
    return f"'{name}' cannot be {_shown(problem['input'])}: {expected}" if name else expected


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # of an object of the user's own, or of a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"
