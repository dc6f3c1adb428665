"""Save a checkpoint: collect tensors and header, and write them atomically."""

import copy
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.anatomy.wrappers import unwrapped
from regraft.arguments import check_arguments, check_minimum, check_target, check_weights
from regraft.card import ATTRIBUTE, Card, Recipe, Source, attach, card_of
from regraft.checkpoint.delta import SHARD_BYTES, choose_base, differing, pin_base, untied_state_dict
from regraft.checkpoint.file.digest import digests_of
from regraft.checkpoint.file.format import Header, current_versions, digest_of, index_of
from regraft.checkpoint.file.shards import write_checkpoint
from regraft.checkpoint.rebuilding import rebuild
from regraft.errors import CheckpointError, EditError, RegraftError
from regraft.surgery.layer_text.build import describe


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    metadata: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Save `model` as one self-describing safetensors file, and return its path.

    The file holds every tensor of the state dict. Its header holds the recipe that rebuilds the architecture, a digest
    of every tensor, the class names, the preprocessing and the names of frozen parameters. The file is written under a
    temporary name, flushed to the disk and renamed, so a crash leaves a previous file unchanged.

    A network that `create_model` did not make is described as text if possible: layers of `torch.nn` in containers, and
    classes of your own that keep their arguments as attributes. Any other network, and one that was changed by other
    means than regraft's edits, is saved without a recipe, with a warning in the second case; `load_weights` reads it
    into a model of your own. For `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and
    `AveragedModel`, the network inside is saved, under its own names.

    Args:
        model: Any module.
        path: The file to write; its folder must exist.
        base: Registered weights as in `"resnet18@IMAGENET1K_V1"` or `"timm/NAME@TAG"`, or a file: only tensors that
            are not bit-identical to it are written. The file pins its base by digest; a base that is a file is
            searched for beside it.
        metadata: JSON data of your own, kept in the header.
        shard_bytes: Above this total size, several files and an index are written,
            `NAME-00001-of-00003.safetensors` and `NAME.safetensors.index.json`; the index is returned.

    Raises:
        CheckpointError: The base cannot be read, the header would be too long, or a tensor has no bytes of its own
            (quantized by torchao, sparse, on the meta device); nothing was written.
        RunError: The file cannot be written; nothing of it is left, and a previous file is unchanged.
    """
    check_arguments(save, locals())
    check_target(save, "path", path)
    check_minimum(save, 1, shard_bytes=shard_bytes)
    check_weights(save, "model", model)
    target = Path(path)
    model = _without_wrapper(model)
    tensors, shared = untied_state_dict(model)
    card = _card_with_recipe(model)
    header = Header(
        **card.carried,
        card=card,
        shared=shared,
        frozen=tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
        versions=current_versions(),
        metadata=metadata or {},
    )
    if base is None:
        header = header.model_copy(update={"digests": digests_of(tensors)})
        return write_checkpoint(target, tensors, header, shard_bytes)
    place = choose_base(base)
    if isinstance(place, Path) and place.resolve() in (target.resolve(), index_of(target).resolve()):
        raise CheckpointError(f"'{target}' cannot be its own base. Give the delta another name. Nothing was written.")
    pinned, base_contents = pin_base(place)
    stored = differing(tensors, base_contents)
    digests, base_digests = digests_of(stored), base_contents.all_digests()
    differences = {
        "digests": digests,
        "base": pinned,
        "removed": tuple(name for name in base_contents.expanded() if name not in tensors and name not in shared),
        "whole": digest_of({name: digests.get(name) or base_digests[name] for name in tensors}),
    }
    return write_checkpoint(target, stored, header.model_copy(update=differences), shard_bytes)


def _without_wrapper(model: nn.Module) -> nn.Module:
    """Return the network inside of `torch.compile`, `DataParallel` and the like, with the card of the wrapper."""
    prefix, inner = unwrapped(model)
    if not prefix:
        return model
    outer = vars(model).get(ATTRIBUTE)  # `fit` attaches class names to what it trained, here the wrapper
    if outer is None:
        return inner
    own = card_of(inner)
    known = {name: value for name in type(outer).model_fields if (value := getattr(outer, name))}
    return attach(copy.copy(inner), **{**known, "recipe": own.recipe or outer.recipe})


def _card_with_recipe(model: nn.Module) -> Card:
    """Return the card of `model`, with a recipe if one rebuilds it."""
    card = card_of(model)
    if card.recipe is None:
        return card.model_copy(update={"recipe": _describe(model)})
    difference = _difference(model, card.recipe)
    if difference is None:
        return card
    warnings.warn(
        f"the model no longer matches its recipe ({difference}), so it is saved without one: load it with "
        "load_weights into a model of your own. Edits made with regraft keep the recipe.",
        stacklevel=3,
    )
    return card.model_copy(update={"recipe": None})


def _describe(model: nn.Module) -> Recipe | None:
    """Return the recipe of a network that text can describe; None for any other. `load` ties tied tensors again."""
    try:
        recipe = Recipe(source=Source(name="torch.nn", weights="none", layers=describe(model, tied=True)))
    except EditError:
        return None
    return recipe if _difference(model, recipe) is None else None


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
        has_geometry = type(layer).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.pooling")
        layers[path] = type(layer).__name__, layer.extra_repr() if has_geometry else ""  # stride, padding and the like
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {**layers, **shapes}
