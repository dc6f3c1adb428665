"""Write a checkpoint, so that a reader finds either the old file or the whole new one."""

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
from regraft.checkpoint.create import rebuild
from regraft.checkpoint.delta import SHARD_BYTES, choose_base, differing, pin_base, untied_state_dict
from regraft.checkpoint.file.digest import digests_of
from regraft.checkpoint.file.format import Header, current_versions, digest_of, index_of
from regraft.checkpoint.file.shards import write_checkpoint
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

    The file holds every tensor of the state dict, and in its header the recipe that rebuilds the architecture, a digest
    of every tensor, the class names, the preprocessing and which parameters are frozen. It is written under another
    name, flushed to the disk and renamed, so a crash leaves the previous file as it was.

    A network that `create_model` did not make is described as text where that can be done: layers of `torch.nn` in
    containers, and classes of your own that keep their arguments as attributes. Any other, and one that was changed by
    other means than regraft's edits, is saved without a recipe, with a warning in the second case; `load_weights` reads
    it into a model of your own. Of `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and
    `AveragedModel` the network inside is saved, under its own names.

    Args:
        model: Any module.
        path: Where to; its folder must exist.
        base: Registered weights as in `"resnet18@IMAGENET1K_V1"` or `"timm/NAME@TAG"`, or a file: only what differs
            from it, bit by bit, is written. The file pins its base by digest; a base that is a file is looked for
            beside it.
        metadata: JSON data of your own, kept in the header.
        shard_bytes: Above this size of all tensors it is written as several files and an index,
            `NAME-00001-of-00003.safetensors` and `NAME.safetensors.index.json`; the index is returned.

    Raises:
        CheckpointError: The base cannot be read, the header would be too long, or a tensor has no bytes of its own
            (quantized by torchao, sparse, on the meta device); nothing was written.
        RunError: The file cannot be written; nothing of it is left, and a previous file is as it was.
    """
    check_arguments(save, locals())
    check_target(save, "path", path)
    check_minimum(save, 1, shard_bytes=shard_bytes)
    check_weights(save, "model", model)
    target = Path(path)
    model = _carried(model)
    tensors, shared = untied_state_dict(model)
    card = _described_card(model)
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
    pinned, theirs = pin_base(place)
    held = differing(tensors, theirs)
    digests, known = digests_of(held), theirs.all_digests()
    differences = {
        "digests": digests,
        "base": pinned,
        "removed": tuple(name for name in theirs.expanded() if name not in tensors and name not in shared),
        "whole": digest_of({name: digests.get(name) or known[name] for name in tensors}),
    }
    return write_checkpoint(target, held, header.model_copy(update=differences), shard_bytes)


def _carried(model: nn.Module) -> nn.Module:
    """Return the network inside of `torch.compile`, `DataParallel` and the like, with the card of its wrapper."""
    prefix, inner = unwrapped(model)
    if not prefix:
        return model
    outer = vars(model).get(ATTRIBUTE)  # what `fit` learned of the classes, where it trained the wrapper
    if outer is None:
        return inner
    own = card_of(inner)
    known = {name: value for name in type(outer).model_fields if (value := getattr(outer, name))}
    return attach(copy.copy(inner), **{**known, "recipe": own.recipe or outer.recipe})


def _described_card(model: nn.Module) -> Card:
    """Return the card of `model`, with a recipe where one rebuilds it."""
    card = card_of(model)
    if card.recipe is None:
        return card.model_copy(update={"recipe": _described(model)})
    difference = _difference(model, card.recipe)
    if difference is None:
        return card
    warnings.warn(
        f"the model no longer matches its recipe ({difference}), so it is saved without one: load it with "
        "load_weights into a model of your own. Edits made with regraft keep the recipe.",
        stacklevel=3,
    )
    return card.model_copy(update={"recipe": None})


def _described(model: nn.Module) -> Recipe | None:
    """Describe a network that text can describe; None for any other. A reader ties anew what is tied."""
    try:
        recipe = Recipe(source=Source(name="torch.nn", weights="none", layers=describe(model, tied=True)))
    except EditError:
        return None
    return recipe if _difference(model, recipe) is None else None


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
    return _structure(rebuild(Recipe.model_validate_json(recipe_json), trust_code=True, unset=True))


def _structure(model: nn.Module) -> dict[str, object]:
    """Return the shape of each tensor and the kind of each layer, with what the kind alone does not say of it."""
    kinds = {path: type(layer).__name__ for path, layer in model.named_modules(remove_duplicate=False)}
    geometry = {
        path: f"{kinds[path]}({layer.extra_repr()})"  # stride, padding and the like, which no tensor shows
        for path, layer in model.named_modules(remove_duplicate=False)
        if type(layer).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.pooling")
    }
    shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {**kinds, **geometry, **shapes}
