"""Plans: a network as a TOML file, with its source, weights, edits and frozen layers.

    source = "resnet18"
    weights = "resnet18_300.safetensors"

    [[edits]]
    truncate = { drop = 1 }

    [[edits]]
    append = { layers = ["Linear(512, 400)", "ReLU()", "Linear(400, 300)"] }

    [freeze]
    until = "layer3.0"

An edit is the name of one of regraft's functions with its arguments, as in Python; layers are text. The recipe in a
checkpoint holds the same steps.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ConfigDict, Field, ValidationError, field_serializer, field_validator
from torch import nn

from regraft.arguments import check_arguments
from regraft.card import Recipe, Source, Step, attach, card_of
from regraft.checkpoint.create import create_model
from regraft.display import block, shortened, some
from regraft.errors import ConfigError, EditError
from regraft.fields import CheckedFields
from regraft.freezing.flags import freeze
from regraft.surgery.layer_text.build import construct
from regraft.surgery.recipe import apply_step

MAX_EDITS = 6  # in a session


class Freezing(CheckedFields):
    """What a plan freezes: patterns as for `select`, and everything up to a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[str, ...] = ()
    until: str | None = None


class Plan(CheckedFields):
    """A network to build.

    Attributes:
        source: A name as for `create_model`, a checkpoint file, or layers of torch.nn as text.
        weights: As for `create_model`; ignored if the source is layers.
        edits: Edits to apply, in this order.
        freeze: What to freeze after the edits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    weights: str = "default"
    edits: tuple[Step, ...] = ()
    freeze: Freezing = Field(default_factory=Freezing)

    @field_validator("edits", mode="before")
    @classmethod
    def _read_edits(cls, edits: Any) -> Any:
        if not isinstance(edits, (list, tuple)):
            raise ValueError("expected a list of edits, each [[edits]] with one line such as truncate = { drop = 1 }")
        return [edit if isinstance(edit, Step) else _read_edit(edit) for edit in edits]

    @field_serializer("edits")
    def _write_edits(self, edits: tuple[Step, ...]) -> list[dict[str, Any]]:
        return [{edit.operation: edit.arguments} for edit in edits]

    def __repr__(self) -> str:
        edits = [text for (text,) in shortened([[str(edit)] for edit in self.edits], MAX_EDITS - 1, 1)]
        freezing = [*self.freeze.layers, *([f"until {self.freeze.until}"] if self.freeze.until else [])]
        return block(
            f"Plan: {self.source}, weights {self.weights}",
            [*(("edits" if not number else "", text) for number, text in enumerate(edits)), ("freeze", some(freezing))],
        )

    def to_toml(self) -> str:
        """Return the plan as the text of a TOML file."""
        import tomli_w

        values = self.model_dump(mode="json", exclude={"edits"}, exclude_none=True, exclude_defaults=True)
        edits = "".join(f"\n[[edits]]\n{step.operation} = {_inline_toml(step.arguments)}\n" for step in self.edits)
        freezing = values.pop("freeze", None)
        return tomli_w.dumps(values) + edits + ("\n" + tomli_w.dumps({"freeze": freezing}) if freezing else "")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan from a TOML file.

    Raises:
        ConfigError: The file is missing or malformed; the message names the entry.
    """
    check_arguments(read_plan, locals())
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no plan '{file}' (looked from {Path.cwd()}). Give the path of a .toml file.")
    try:
        return Plan.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{file}' is not TOML: {error}.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "plan"
        reason = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"the plan '{file}' is wrong at '{where}': {reason}.") from error


def build_plan(plan: Plan, *, trust_code: bool = False) -> nn.Module:
    """Build the network that a plan describes; new layers have fresh weights.

    Raises:
        ModelError: The source is unknown.
        EditError: An edit does not fit; the message says which.
        SelectionError: A path or pattern matches nothing.
        TrustError: The plan names the user's own code, and `trust_code` is false.
    """
    check_arguments(build_plan, locals())
    model = _build_source(plan, trust_code)
    for position, step in enumerate(plan.edits, 1):
        try:
            model = apply_step(model, step, trust_code=trust_code)
        except EditError as error:
            raise EditError(f"edit {position} of {len(plan.edits)}: {error}") from error
    if plan.freeze.layers or plan.freeze.until is not None:
        freeze(model, *plan.freeze.layers, until=plan.freeze.until)
    return model


def plan_of(model: nn.Module) -> Plan:
    """Return the plan of a network that has a recipe.

    Raises:
        EditError: It has no recipe, was built with arguments other than `num_classes`, or is joined from several
            networks, each of which has a plan of its own.
    """
    check_arguments(plan_of, locals())
    recipe = card_of(model).recipe
    if recipe is None:
        raise EditError(
            f"{type(model).__name__} has no recipe, so its construction is unknown. Models of create_model that were "
            "changed by edits of regraft only have one."
        )
    if recipe.source.parts:
        raise EditError(f"a network from {recipe.source.name} has several sources, which one plan cannot hold.")
    arguments, steps = recipe.source.arguments, recipe.steps
    if set(arguments) == {"num_classes"}:
        steps = (Step(operation="replace_head", arguments={"new": arguments["num_classes"]}), *steps)
    elif arguments:
        raise EditError(f"'{recipe.source.name}' was built with {', '.join(sorted(arguments))}, which no plan holds.")
    source = recipe.source.layers or recipe.source.name
    freezing = Freezing(layers=tuple(_frozen_patterns(model, "")))
    return Plan(source=source, weights=recipe.source.weights, edits=steps, freeze=freezing)


def _build_source(plan: Plan, trust_code: bool) -> nn.Module:
    """Build the network that a plan starts from."""
    if plan.source.endswith(")"):
        model = construct(plan.source, trust_code=trust_code)
        return attach(model, recipe=Recipe(source=Source(name="torch.nn", layers=plan.source)))
    return create_model(plan.source, weights=plan.weights, trust_code=trust_code)


def _inline_toml(value: Any) -> str:
    """Return a value as inline TOML, which is easier to read than one table per value."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_inline_toml(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline_toml, value)) + "]"
    return json.dumps(value)  # JSON's strings, numbers and booleans are valid TOML


def _read_edit(edit: Any) -> Step:
    """Parse one edit of a plan.

    Raises:
        ValueError: It is malformed; pydantic adds its place in the plan.
    """
    if not isinstance(edit, dict) or len(edit) != 1:
        raise ValueError(f"each edit holds one operation, as in truncate = {{ drop = 1 }}, not {edit!r}")
    ((operation, arguments),) = edit.items()
    known = get_args(Step.model_fields["operation"].annotation)
    if operation not in known:
        raise ValueError(f"no edit '{operation}', expected one of {', '.join(known)}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the edit '{operation}' needs its arguments by name, as in {operation} = {{ path = … }}")
    return Step(operation=cast(Any, operation), arguments=arguments)


def _frozen_patterns(layer: nn.Module, path: str) -> list[str]:
    """List patterns that select the frozen parameters: whole layers if possible, otherwise single parameters."""
    flags = [parameter.requires_grad for parameter in layer.parameters()]
    if all(flags):
        return []
    if not any(flags):
        return [path]
    own = [name for name, parameter in layer.named_parameters(recurse=False) if not parameter.requires_grad]
    inner = [
        pattern
        for name, child in layer.named_children()
        for pattern in _frozen_patterns(child, f"{path}.{name}".lstrip("."))
    ]
    return [*(f"params:{path}.{name}".replace(":.", ":") for name in own), *inner]
