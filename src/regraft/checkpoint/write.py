"""Save a checkpoint: collect tensors and header, and write them atomically."""

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regraft.anatomy.wrappers import unwrapped
from regraft.arguments import check_arguments, check_minimum, check_target, check_weights, shown
from regraft.card import ATTRIBUTE, Card, Preprocessing, Recipe, attach, card_of
from regraft.checkpoint.delta import SHARD_BYTES, choose_base, differing, pin_base, untied_state_dict
from regraft.checkpoint.file.digest import digests_of
from regraft.checkpoint.file.format import Header, current_versions, digest_of, index_of
from regraft.checkpoint.file.shards import write_checkpoint
from regraft.checkpoint.recipes.derivation import derive_recipe
from regraft.checkpoint.recipes.own_files import portable_recipe
from regraft.checkpoint.storable import require_storable, stored_state
from regraft.errors import ArgumentError, CheckpointError
from regraft.zoo import own_preprocessing


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    metadata: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Save `model` as one self-describing safetensors file, and return its path.

    The file holds every tensor of the state dict. Its header holds the recipe that rebuilds the architecture, a digest
    of every tensor, the class names, the preprocessing and the names of frozen parameters. The file is written under a
    temporary name, flushed to the disk and renamed, so a crash leaves a previous file unchanged.

    The recipe of a network that `create_model` did not make is derived, and proved by building it: networks of
    torchvision, timm and transformers that their own constructors made, layers of `torch.nn` in containers, classes of
    your own in a file that can be built without arguments or keep these as attributes; with whatever layers of them
    were replaced. Where there is no recipe, a warning says why, and `load_weights` reads the file into a model of your
    own. For `torch.compile(model)`, `DataParallel`, `DistributedDataParallel` and `AveragedModel`, the network inside
    is saved, under its own names.

    Args:
        model: Any module.
        path: The file to write; its folder must exist.
        base: Registered weights as in `"resnet18@IMAGENET1K_V1"` or `"timm/NAME@TAG"`, or a file: only tensors that
            are not bit-identical to it are written. The file pins its base by digest; a base that is a file is
            searched for beside it.
        classes: Names of its K outputs, in their order, for a network that a training loop of your own made: `predict`
            and `evaluate` need them. None keeps what the network knows, as `fit` sets it.
        preprocessing: What turns a photo into its input; None keeps what it knows, see `Preprocessing`.
        metadata: JSON data of your own, kept in the header.
        shard_bytes: Above this total size, several files and an index are written,
            `NAME-00001-of-00003.safetensors` and `NAME.safetensors.index.json`; the index is returned.

    Raises:
        ArgumentError: A name of a class is empty, or there twice; nothing was written.
        CheckpointError: The base cannot be read, the header would be too long, or a tensor has no bytes of its own
            (quantized by torchao, sparse, on the meta device); nothing was written.
        RunError: The file cannot be written; nothing of it is left, and a previous file is unchanged.
    """
    check_arguments(save, locals())
    check_target(save, "path", path)
    check_minimum(save, 1, shard_bytes=shard_bytes)
    check_weights(save, "model", model)
    if classes is not None and (len(set(classes)) != len(classes) or not all(classes)):
        raise ArgumentError(
            f"save: classes is {shown(list(classes))}, expected a name of its own for each output. Nothing was written."
        )
    model = _with_card(without_wrapper(model), classes, preprocessing)
    require_storable(stored_state(model))
    derivation = derive_recipe(model)
    written = write_model(model, path, derivation.recipe, base=base, metadata=metadata, shard_bytes=shard_bytes)
    if derivation.reason is not None:
        warnings.warn(derivation.warning(written), stacklevel=2)
    return written


def write_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    recipe: Recipe | None,
    *,
    base: str | os.PathLike[str] | None = None,
    metadata: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Save `model` as `save` does, with a recipe that is known to rebuild it, or without one."""
    target = Path(path)
    model = without_wrapper(model)
    tensors, shared = untied_state_dict(model)
    card = _card(model, recipe, target.parent)
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


def without_wrapper(model: nn.Module) -> nn.Module:
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


def _with_card(model: nn.Module, classes: Sequence[str] | None, preprocessing: Preprocessing | None) -> nn.Module:
    """Return `model`, or a shallow copy that knows these classes and this preprocessing."""
    fields: dict[str, Any] = {"preprocessing": preprocessing} if preprocessing is not None else {}
    if classes is not None:
        fields |= {"classes": tuple(classes), "task": "classification"}
    return attach(copy.copy(model), **fields) if fields else model


def _card(model: nn.Module, recipe: Recipe | None, folder: Path) -> Card:
    """Return the card of `model` as it is written into a checkpoint in `folder`."""
    card = card_of(model)
    fields: dict[str, Any] = {"recipe": portable_recipe(recipe, folder) if recipe is not None else None}
    if recipe is not None and card.preprocessing is None and (known := own_preprocessing(model)) is not None:
        fields["preprocessing"] = known
    return card.model_copy(update=fields)
