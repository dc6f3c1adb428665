"""Write a checkpoint, so that a reader finds either the old file or the whole new one."""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.card import Recipe, Source, card_of
from regraft.checkpoint.build import rebuild
from regraft.checkpoint.digest import tensor_digest
from regraft.checkpoint.format import KEY, Header, current_versions
from regraft.errors import EditError, RegraftError, RunError
from regraft.surgery.layerspec import describe


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None) -> Path:
    """Save `model` as one self-describing safetensors file, and return its path.

    The file holds every tensor of the state dict, and in its header the recipe that rebuilds the architecture, a digest
    of every tensor, the class names, the preprocessing and which parameters are frozen. It is written under another
    name, flushed to the disk and renamed, so a crash leaves the previous file as it was.

    A network that `create_model` did not make is described as text where that can be done: layers of `torch.nn` in
    containers, and classes of your own that keep their arguments as attributes. Any other, and one that was changed by
    other means than regraft's edits, is saved without a recipe, with a warning in the second case; `load_weights` reads
    it into a model of your own.

    Args:
        model: Any module.
        path: Where to; its folder must exist.
        metadata: JSON data of your own, kept in the header.

    Raises:
        RunError: The file cannot be written; nothing of it is left, and a previous file is as it was.
    """
    target = Path(path)
    card = card_of(model)
    if card.recipe is None:
        card = card.model_copy(update={"recipe": _described(model)})
    elif (difference := _difference(model, card.recipe)) is not None:
        warnings.warn(
            f"the model no longer matches its recipe ({difference}), so it is saved without one: load it with "
            "load_weights into a model of your own. Edits made with regraft keep the recipe.",
            stacklevel=2,
        )
        card = card.model_copy(update={"recipe": None})
    tensors, shared = _unshared(model)
    header = Header(
        card=card,
        digests={name: tensor_digest(tensor) for name, tensor in tensors.items()},
        shared=shared,
        frozen=tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
        versions=current_versions(),
        metadata=metadata or {},
    )
    _write_atomically(target, tensors, {KEY: header.model_dump_json()})
    return target


def _described(model: nn.Module) -> Recipe | None:
    """Describe a network that text can describe; None for any other. A reader ties anew what is tied."""
    try:
        recipe = Recipe(source=Source(name="torch.nn", weights="none", layers=describe(model, tied=True)))
    except EditError:
        return None
    return recipe if _difference(model, recipe) is None else None


def _unshared(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor of the state dict once, and the names of those that are the same as another."""
    tensors, shared, first_names = {}, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_names.setdefault(id(tensor), name)
        if first == name:
            plain = tensor.detach().cpu().contiguous()
            tensors[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
        else:
            shared[name] = first
    return tensors, shared


def _difference(model: nn.Module, recipe: Recipe) -> str | None:
    """Name the first place in which `model` differs from what `recipe` builds; None where there is none."""
    try:
        expected = _expected_structure(recipe.model_dump_json())
    except RegraftError as error:
        return str(error)
    found = _structure(model)
    return next((f"'{name}'" for name in [*expected, *found] if found.get(name) != expected.get(name)), None)


@functools.lru_cache(maxsize=4)
def _expected_structure(recipe_json: str) -> dict[str, object]:
    # A class of the user's own is running already, as the model exists: importing it again trusts nothing new.
    return _structure(rebuild(Recipe.model_validate_json(recipe_json), trust_code=True))


def _structure(model: nn.Module) -> dict[str, object]:
    """Return the shape of each tensor and the kind of each layer, with what the kind alone does not say of it."""
    kinds = {path: type(layer).__name__ for path, layer in model.named_modules(remove_duplicate=False)}
    geometry = {
        path: f"{kinds[path]}({layer.extra_repr()})"  # stride, padding and the like, which no tensor shows
        for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.pooling")
    }
    return {**kinds, **geometry, **{name: tensor.shape for name, tensor in model.state_dict().items()}}


def _write_atomically(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except Exception as error:
        raise RunError(
            f"cannot write '{target}': {error}. Nothing of it was kept; free some space and retry."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
