"""Replace the classification head of a network."""

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from regraft.anatomy.class_heads import COUNTS
from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.heads import width_of
from regraft.anatomy.inputs import Inputs
from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.modes import in_mode, unmoved_on_failure
from regraft.anatomy.paths import layer_at, parent_and_name
from regraft.anatomy.shape_copies import shared_copy
from regraft.anatomy.tracing import Trace
from regraft.arguments import check_arguments
from regraft.card import card_of
from regraft.errors import EditError, ForwardError, nearest
from regraft.surgery.checks import finish, prove, require_editable
from regraft.surgery.fitting import materialize_lazy, place
from regraft.surgery.new_head import kept_tensors, layer_like, norm_like
from regraft.surgery.swap import with_layers
from regraft.wording import for_caller

New = int | nn.Module


@unmoved_on_failure()
def replace_head(
    model: nn.Module,
    new: New | Mapping[str, New],
    *,
    path: str | Sequence[str] | None = None,
    keep: Mapping[int | str, int] | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return `model` with another classifier. The structure of `model` stays as it is; all other weights are shared.

    The new layer has the device, the dtype and the mode of the old one, and fresh weights from torch's random state. A
    weight or spectral norm of the old one is put on it, and a norm layer after it gets the new width.

    In a network with several heads, each that gives class scores is replaced: distilled and auxiliary ones (also those
    of Inception and GoogLeNet, which run only in training mode), and a detector's scores, but not its boxes. Where it
    is unclear which heads these are, nothing is replaced, and the error names all. Attributes that store the width are
    updated: `num_classes`, and `num_labels` and the labels of a Hugging Face configuration, so that the network's own
    loss still works.

    Args:
        model: Any module.
        new: The number of classes K, for a layer of the same kind as the old one that gives (N, K); or a module; or for
            each path of a head one of these, as in `{"scores": 4, "boxes": 16}`.
        path: Path of the layer to replace, or several; found by `class_heads` where not given.
        keep: New index of each old class that is kept, as in `{0: 0, 1: 2}`; old classes also by name, where the
            model's card has names. Their rows of weights and biases are copied bit for bit, so that a class can be
            added without forgetting the others: their scores stay the same, up to the rounding of a matrix product of
            another width.
        inputs: What the forward takes, to find the head and for the check; guessed where not given, see `summary`.

    Raises:
        EditError: The head is of a kind that cannot be built for another number of classes, does not fit, or has no
            such classes to keep; or there are several, and it is unclear which of them give classes. Nothing was
            changed.
        SelectionError: No layer has that path. Nothing was changed.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    >>> replace_head(model, 3)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=12, out_features=3, bias=True)
    )
    """
    check_arguments(replace_head, locals())
    require_editable(model)
    if not isinstance(new, (nn.Module, Mapping)):
        new = operator.index(new)  # NumPy's integers, too
    _check_new(new, path)
    if path is None and isinstance(new, int) and not keep and getattr(model, "num_classes", None) == 0:
        edited = _with_timm_classifier(model, new, inputs)
        if edited is not None:
            return finish(edited, model, "replace_head", new_outputs=True, new=new)
    facts = ModelFacts(model, inputs)
    targets = _targets(facts, new, path)
    pairs = _kept_classes(model, keep or {})
    layers = {target.path: _new_head(facts, target) for target in targets}
    kept = list(layers.items()) if pairs else []
    for head, layer in kept:
        _require_kept_rows(model.get_submodule(head), layer, head, pairs)
    edited = with_layers(model, layers)
    is_automatic = path is None and not isinstance(new, Mapping)
    for target in targets:
        if isinstance(target.new, int):
            before = width_of(model.get_submodule(target.path))
            before = before // target.scores_per_class if before is not None else None
            _set_class_count(edited, [target.path], before, target.new, is_sure=is_automatic)
    what = f"replace the head {', '.join(map(repr, layers))}"
    run = _prove_with_followers(edited, model, targets, what, inputs)
    materialize_lazy(edited, layers, run, what)
    if is_automatic and run is not None:
        _require_called(edited, targets, run, what)
    rows = [row for head, layer in kept for row in _kept_rows(model.get_submodule(head), layer, head)]
    with torch.no_grad():
        for old_rows, new_rows in rows:
            new_rows[list(pairs.values())] = old_rows[list(pairs)].to(new_rows.dtype)
    if isinstance(new, nn.Module) and run is not None and (classes := run.class_count) is not None:
        before = width_of(model.get_submodule(targets[0].path))
        _set_class_count(edited, list(layers), before, classes, is_sure=is_automatic)
    for head, layer in layers.items():
        in_mode(layer, model.get_submodule(head).training)
    if is_automatic:
        path = targets[0].path if len(targets) == 1 else None  # a recipe without a path finds several heads again
    return finish(edited, model, "replace_head", new_outputs=True, path=path, new=new)


@dataclass(frozen=True)
class _Target:
    """The replacement of one head.

    Attributes:
        path: Path of the head.
        new: Number of classes, or the layer.
        scores_per_class: How many outputs it has for each class.
        is_idle: Whether it is not called in evaluation mode.
    """

    path: str
    new: New
    scores_per_class: int = 1
    is_idle: bool = False


def _check_new(new: New | Mapping[str, New], path: str | Sequence[str] | None) -> None:
    """Refuse arguments that are empty, negative or contradict each other."""
    if isinstance(new, Mapping):
        if not new or path is not None:
            raise EditError(
                f"heads by path are a dict such as {{'classifier': 10}}, and exclude path=; not {new!r}"
                f"{f' with path={path!r}' if path is not None else ''}. Nothing was changed."
            )
        for head in new.values():
            _check_new(head, None)
        return
    if isinstance(new, int) and new < 1:
        raise EditError(f"a head needs at least 1 output, not {new}. Nothing was changed.")
    if path is not None and not path:
        raise EditError(f"path is the path of a layer or a list of such, not {path!r}. Nothing was changed.")


def _targets(facts: ModelFacts, new: Any, path: str | Sequence[str] | None) -> list[_Target]:
    if isinstance(new, Mapping):
        return [_Target(head, replacement) for head, replacement in new.items()]
    if path is not None:
        paths = [path] if isinstance(path, str) else list(dict.fromkeys(path))
        return [_Target(head, _own(new, position)) for position, head in enumerate(paths)]
    targets = [_Target(head.path, _own(new, i), head.scores_per_class) for i, head in enumerate(facts.class_heads)]
    idle = facts.auxiliary_heads([target.path for target in targets])
    return [*targets, *(_Target(head, _own(new, 1), is_idle=True) for head in idle)]


def _prove_with_followers(
    edited: nn.Module, model: nn.Module, targets: Sequence[_Target], what: str, inputs: Inputs | None
) -> Trace | None:
    """Run the edited network on shapes, as `prove` does, and give norms that follow a head its new width, in place."""
    widths = [
        (width_of(model.get_submodule(target.path)), target.new * target.scores_per_class)
        for target in targets
        if isinstance(target.new, int)
    ]
    # Each turn replaces one norm, at the place where the run fails; the next may fail further on.
    while True:
        try:
            return prove(edited, model, what, inputs)
        except EditError as error:
            failure = error.__cause__
            if not isinstance(failure, ForwardError) or not failure.path:
                raise
            old = edited.get_submodule(failure.path)
            sides = {side for shape in failure.given for side in shape[1:]}  # of all dimensions but the batch
            fitting = ((before, after) for before, after in widths if before and after in sides)
            follower = next((layer for pair in fitting if (layer := norm_like(old, *pair)) is not None), None)
            if follower is None:
                raise
            parent, name = parent_and_name(failure.path)
            setattr(edited.get_submodule(parent), name, place(follower, model).train(old.training))


def _require_called(edited: nn.Module, targets: Sequence[_Target], run: Trace, what: str) -> None:
    """Refuse a module at a path that the network never calls, as it only reads the layer's weight.

    Raises:
        EditError: A target is such a module.
    """
    called = {call.path for call in run.calls}
    for target in targets:
        if isinstance(target.new, nn.Module) and not target.is_idle and target.path not in called:
            raise EditError(
                f"cannot {what}: that layer is never called, {type(edited).__name__} only reads its weight, so a "
                "module in its place would have no effect. Give a number of classes. Nothing was changed."
            )


def _with_timm_classifier(model: nn.Module, classes: int, inputs: Inputs | None) -> nn.Module | None:
    """Return a timm network without a classifier with the one that `reset_classifier` builds; None for all others."""
    if not callable(getattr(model, "reset_classifier", None)):
        return None
    edited = shared_copy(model)
    known = set(edited.modules())  # the layers themselves: the identity of one that is gone may be given to a new one
    flags = {parameter: parameter.requires_grad for parameter in edited.parameters()}
    try:
        cast(Any, edited).reset_classifier(classes)
    except Exception:  # any class may have a method of that name; the head is then found as in other networks
        return None
    finally:
        for parameter, flag in flags.items():  # `model` shares the parameters
            parameter.requires_grad_(flag)
    if all(parameter in flags for parameter in edited.parameters()):
        return None
    for layer in [layer for layer in edited.modules() if layer not in known]:
        place(layer, model).train(model.training)
    prove(edited, model, f"give {type(model).__name__} a head for {classes} classes", inputs)
    return edited


def _set_class_count(
    model: nn.Module, heads: Sequence[str], before: int | None, classes: int, *, is_sure: bool
) -> None:
    """Update the attributes and configurations that store the number of classes, in place.

    Where it is not sure that the layer is the main head, only those that held the width of the old one.
    """
    for owner in ["", *dict.fromkeys(path for head in heads for path in ancestors(head))]:
        attributes = vars(model.get_submodule(owner))
        for name in COUNTS:
            held_width = attributes.get(name) in (before, 0) or (before is None and not owner)
            if isinstance(attributes.get(name), int) and (held_width or (is_sure and not owner)):
                attributes[name] = classes
        _set_labels(getattr(model.get_submodule(owner), "config", None), before, classes, is_sure=is_sure)


def _set_labels(config: Any, before: int | None, classes: int, *, is_sure: bool) -> None:
    """Set the labels of a Hugging Face configuration, whose `num_labels` counts these, in place."""
    if not hasattr(config, "id2label") or not hasattr(config, "label2id"):
        return
    if is_sure or before in (None, len(config.id2label)):
        config.id2label = {index: f"LABEL_{index}" for index in range(classes)}
        config.label2id = {label: index for index, label in config.id2label.items()}
        if 1 in (before, classes) and before != classes:  # regression to classes or back: the loss is chosen again
            config.problem_type = None


def _kept_classes(model: nn.Module, keep: Mapping[int | str, int]) -> dict[int, int]:
    """Return the new index of each old class that is kept, by its old index.

    Raises:
        EditError: An old class is unknown, or a class is named twice.
    """
    names = card_of(model).classes
    pairs: dict[Any, int] = {}
    for old, new in keep.items():
        if isinstance(old, str) and (names is None or old not in names):
            known = "the model's card has no names of classes; give numbers" if names is None else ""
            hint = known or nearest(old, names or ()).rstrip(".") or f"the classes are {', '.join(names or ())}"
            raise EditError(f"keep names the old class '{old}', which is unknown: {hint}. Nothing was changed.")
        index = names.index(old) if isinstance(old, str) and names is not None else old
        if index in pairs or new in pairs.values():
            which = f"the old class {old!r} twice" if index in pairs else f"two old classes the same new one, {new!r}"
            raise EditError(f"keep gives {which}: {dict(keep)}. Nothing was changed.")
        pairs[index] = new
    return pairs


def _require_kept_rows(old: nn.Module, new: nn.Module, path: str, pairs: Mapping[int, int]) -> None:
    """Refuse to keep classes where that is impossible, before a lazy layer gets its shape.

    Raises:
        EditError: No rows can be copied between the two heads, or a class is out of range.
    """
    have, want = width_of(old), width_of(new)
    has_rows = isinstance(new, LazyModuleMixin) or kept_tensors(old, new) is not None
    if have is None or want is None or not has_rows:
        raise _no_rows_error(old, new, path)
    for side, indices, limit in (("old", pairs.keys(), have), ("new", pairs.values(), want)):
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < limit:
                raise EditError(
                    f"keep names the {side} class {index!r}, expected a number from 0 to {limit - 1} "
                    f"('{path}' has {have} classes, its successor {want}). Nothing was changed."
                )


def _kept_rows(old: nn.Module, new: nn.Module, path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of tensors of the old and the new head whose rows are classes.

    Raises:
        EditError: There are none, as a lazy layer became one of another kind.
    """
    tensors = kept_tensors(old, new)
    if tensors is None:
        raise _no_rows_error(old, new, path)
    return tensors


def _no_rows_error(old: nn.Module, new: nn.Module, path: str) -> EditError:
    return EditError(
        f"no classes of '{path}' can be kept: it is a {type(old).__name__}, and another {type(new).__name__} takes "
        "its place. Give a number of classes. Nothing was changed."
    )


def _own(new: int | nn.Module, position: int) -> int | nn.Module:
    """Return `new` for the first of several heads and a copy for each other, so that their weights are not tied."""
    return copy.deepcopy(new) if position and isinstance(new, nn.Module) else new


def _new_head(facts: ModelFacts, target: _Target) -> nn.Module:
    model, path, new = facts.model, target.path, target.new
    if isinstance(new, int) and path in dict(model.named_parameters()):
        choice = for_caller(python=", or name the layer to replace with path=", command="")
        raise EditError(
            f"the head is '{path}', a parameter that {type(model).__name__} multiplies with itself, so its width is up "
            f"to that code. Change it there{choice}. Nothing was changed."
        )
    old = layer_at(model, path)
    if isinstance(new, nn.Module):
        layer = new
    elif isinstance(old, nn.Identity):
        layer = nn.Linear(_width_into(facts, path), new)
    else:
        layer = layer_like(old, new * target.scores_per_class, path)
    layer = place(layer, old, model)
    return layer if layer is new else in_mode(layer, old.training)  # the caller's own changes only where all is well


def _width_into(facts: ModelFacts, path: str) -> int:
    """Return the number of features D in the input (N, D) of the layer at `path`."""
    shapes = next((call.input_shapes for call in facts.trace.calls if call.path == path), ())
    if len(shapes) != 1 or len(shapes[0]) != 2:
        given = ", ".join(map(str, shapes)) or "nothing"
        raise EditError(
            f"the head '{path}' is given {given}, expected features (N, D). Pass a module in its place. "
            "Nothing was changed."
        )
    return shapes[0][1]
