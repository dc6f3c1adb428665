"""Derive the recipe of a network that regraft did not build, and prove it by building it.

A recipe is a source and edits. The source is what a library or a file of the user's builds; whatever differs from it,
such as a head that was set by hand, becomes a step `replace` with the new layer as text. The recipe is followed as
`load` follows it, and counts only where the result is the same network in all but its weights.
"""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from regraft.card import EditOrigin, Recipe, Source, Step, card_of
from regraft.checkpoint.memory import rebuild_for
from regraft.checkpoint.rebuilding import rebuild
from regraft.checkpoint.recipes.candidates import library_sources, own_source, read_arguments
from regraft.checkpoint.recipes.differences import LIBRARIES, differing_layers
from regraft.errors import EditError, RegraftError, TrustError
from regraft.surgery.layer_text.build import describe
from regraft.torch_internals import DropoutBase

MAX_REPLACED = 16  # layers that differ from those of the source; each costs a run on shapes when the file is loaded
TRAINING_OPTIONS = re.compile(r"momentum=[^,]+, ")  # of layers, which change nothing in evaluation
NEAR = 12  # layers that differ, counted with those in them: a network that is as near is taken without a look at others


@dataclass(frozen=True)
class Derivation:
    """A recipe that rebuilds a network, or the reason why there is none; one of them is None.

    Attributes:
        kind: Name of the network's class.
        recipe: The recipe.
        reason: Why there is none.
    """

    kind: str
    recipe: Recipe | None
    reason: str | None = None

    def warning(self, path: str | os.PathLike[str]) -> str:
        """Return what to tell the user about a file without a recipe: why, how to load it, and what to change."""
        return (
            f"no recipe rebuilds this {self.kind}, so regraft.load will refuse '{os.fspath(path)}': {self.reason}. "
            "Load it with load_weights(model, path) into a network that your own code builds. What loads by itself: "
            "networks of torchvision, timm and transformers, layers of torch.nn, and a class in a .py file that is "
            "built without arguments or keeps each in an attribute of its name."
        )


@dataclass(frozen=True)
class _Start:
    """A recipe that builds a network like `model` except for some layers."""

    recipe: Recipe
    differences: dict[str, str]

    def distance(self, model: nn.Module) -> int:
        """Return the number of layers of `model` that it does not build."""
        layers = dict(model.named_modules(remove_duplicate=False))
        return sum(sum(1 for _ in layers[path].modules()) if path in layers else 1 for path in self.differences)


def derive_recipe(model: nn.Module) -> Derivation:
    """Derive a recipe that rebuilds `model`, and prove it.

    The recipe on its card is taken where it is still true, which is checked by classes, shapes and the options of
    torch.nn's layers. Otherwise the candidates are that recipe, the networks of the library that defines the class,
    a description of all layers, and the class of the user's own without arguments; layers that differ are replaced.

    Building a class of the user's own runs its constructor.
    """
    known, kind = card_of(model).recipe, type(model).__name__
    stale = _difference(model, known) if known is not None else None
    if known is not None and stale is None:
        return Derivation(kind, known)
    reasons = [f"it no longer matches its recipe ({stale})"] if stale is not None else []
    for attempt in (_from_recipe, _from_origin, _from_library, _from_text, _from_own_class):
        try:
            recipe = attempt(model)
            if recipe is not None:
                _require_same(model, recipe)
                return Derivation(kind, recipe)
        except RegraftError as error:
            _, _, of_its_class = str(error).partition(f"{type(model).__qualname__} cannot be written as text: ")
            reasons.append((of_its_class or str(error)).rstrip("."))
    return Derivation(kind, None, reasons[0])


def _from_recipe(model: nn.Module) -> Recipe | None:
    known = card_of(model).recipe
    if known is None:
        return None
    reference = rebuild(known, trust_code=True, unset=True)  # its code has run already
    return _completed(model, _Start(known, differing_layers(model, reference)))


def _from_origin(model: nn.Module) -> Recipe | None:
    """Return the recipe of a network that was edited before it had one: that of what it was made from, and the edits.

    Raises:
        EditError: There is none for what it was made from.
    """
    origin: EditOrigin | None = card_of(model).origin
    if origin is None:
        return None
    recipes = []
    for network in origin.networks:
        derivation = derive_recipe(network)
        if derivation.recipe is None:
            raise EditError(f"the {derivation.kind} that it was made from has none, as {derivation.reason}")
        recipes.append(derivation.recipe)
    recipe = recipes[0]
    if origin.joined is not None:
        name, arguments = origin.joined
        recipe = Recipe(source=Source(name=name, parts=tuple(recipes), arguments=arguments))
    return recipe.model_copy(update={"steps": (*recipe.steps, *origin.steps)})


def _from_library(model: nn.Module) -> Recipe | None:
    """Return the recipe by the nearest network of the library that defines the class of `model`."""
    nearest = None
    for source in library_sources(model):
        for start in _starts(model, source):
            if nearest is None or start.distance(model) < nearest.distance(model):
                nearest = start
        if nearest is not None and nearest.distance(model) <= NEAR:
            break
    if nearest is not None:
        return _completed(model, nearest)
    library = type(model).__module__.partition(".")[0]
    if library not in LIBRARIES or type(model).__module__.startswith("torch.nn."):
        return None
    raise EditError(f"it is a {type(model).__name__} of {library}, and no network with a name is of that class")


def _starts(model: nn.Module, source: Source) -> Iterator[_Start]:
    """Yield a source as it is, and with the arguments that `model` shows to have been given."""
    recipe = Recipe(source=source)
    reference = rebuild(recipe, unset=True)
    if type(reference) is not type(model):
        return
    differences = differing_layers(model, reference)
    yield _Start(recipe, differences)
    arguments = read_arguments(model, reference, source) if differences else {}
    if arguments:
        del reference
        recipe = Recipe(source=source.model_copy(update={"arguments": arguments}))
        try:
            reference = rebuild(recipe, unset=True)
        except RegraftError:  # the constructor takes no such argument
            return
        yield _Start(recipe, differing_layers(model, reference))


def _from_text(model: nn.Module) -> Recipe | None:
    module = type(model).__module__
    is_undescribable = module.partition(".")[0] in LIBRARIES and not module.startswith("torch.nn.")
    if is_undescribable or module.startswith("regraft."):
        return None
    return Recipe(source=Source(name="torch.nn", layers=describe(model, tied=True)))


def _from_own_class(model: nn.Module) -> Recipe | None:
    if type(model).__module__.partition(".")[0] in LIBRARIES:
        return None
    if type(model).__module__.startswith("regraft."):
        raise EditError("one of the layers that it was given cannot be written as text")
    recipe = Recipe(source=own_source(model))
    return _completed(model, _Start(recipe, differing_layers(model, rebuild(recipe, trust_code=True))))


def _completed(model: nn.Module, start: _Start) -> Recipe:
    """Return a recipe with a step for each layer that differs.

    Raises:
        EditError: The network itself differs, or a layer cannot be written as text.
    """
    recipe, source = start.recipe, start.recipe.source
    name = source.name if source.name != "torch.nn" else "its recipe"
    if len(start.differences) > MAX_REPLACED:
        raise EditError(f"{len(start.differences)} layers differ from those of {name}, and {MAX_REPLACED} are the most")
    for path, difference in start.differences.items():
        layer = dict(model.named_modules(remove_duplicate=False)).get(path)
        if not path or layer is None:
            raise EditError(f"{_shown(model, path)} is not as {name} builds it: {difference}")
        try:
            text = describe(layer, tied=True)
        except EditError as error:
            raise EditError(f"{_shown(model, path)} is not as {name} builds it ({difference}), and {error}") from error
        recipe = recipe.then(Step(operation="replace", arguments={"path": path, "new": text}))
    return recipe


def _require_same(model: nn.Module, recipe: Recipe) -> None:
    """Follow a recipe as `load` does, from its text and within the same limits of memory, and compare the result.

    Raises:
        RegraftError: It cannot be followed, or gives another network.
    """
    stored = Recipe.model_validate_json(recipe.model_dump_json())
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kept_bytes = sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())  # tied tensors once
    build = functools.partial(rebuild_for, Path("the file"), stored, shapes, kept_bytes=kept_bytes)
    try:
        rebuilt = build()
    except TrustError:
        rebuilt = build(trust_code=True)
    for path, difference in differing_layers(model, rebuilt).items():
        raise EditError(f"{_shown(model, path)} is not as {recipe.source.name} builds it: {difference}")


def _shown(model: nn.Module, path: str) -> str:
    return f"'{path}'" if path else f"the {type(model).__name__} itself"


def _difference(model: nn.Module, recipe: Recipe) -> str | None:
    """Return the name of the first difference between `model` and what `recipe` builds; None if there is none."""
    try:
        expected = _expected_structure(recipe.model_dump_json())
    except RegraftError as error:
        return str(error)
    structure = _structure(model)
    return next((f"'{name}'" for name in [*expected, *structure] if structure.get(name) != expected.get(name)), None)


@functools.lru_cache(maxsize=4)
def _expected_structure(recipe_json: str) -> dict[str, object]:
    # The model exists, so a user's own class has already been imported: importing it again trusts nothing new.
    return _structure(rebuild(Recipe.model_validate_json(recipe_json), trust_code=True, unset=True))


def _structure(model: nn.Module) -> dict[str, object]:
    """Return the type of each layer, with the options that no tensor shows, and the shape of each tensor, by name."""
    layers: dict[str, object] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        is_shown = type(layer).__module__.startswith("torch.nn.modules.") and not isinstance(layer, DropoutBase)
        options = layer.extra_repr() if is_shown else ""  # stride, eps and the like
        layers[path] = type(layer).__name__, TRAINING_OPTIONS.sub("", options)
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {**layers, **shapes}
