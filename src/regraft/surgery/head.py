"""Put another classifier in the place of a network's own."""

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from regraft.anatomy.graph import ancestors
from regraft.anatomy.heads import CONVOLUTIONS, find_auxiliary_heads, find_heads, width_of
from regraft.anatomy.inputs import Inputs
from regraft.anatomy.modes import unmoved_on_failure
from regraft.anatomy.paths import layer_at
from regraft.anatomy.tracing import Trace, trace
from regraft.anatomy.twins import shared_copy
from regraft.arguments import check_arguments
from regraft.card import card_of
from regraft.errors import EditError, nearest
from regraft.surgery.checks import prove, require_editable
from regraft.surgery.fitting import place, settled
from regraft.surgery.record import finish
from regraft.surgery.swap import with_layers

COUNTS = ("num_classes", "num_labels")  # attributes in which networks keep the number of their classes


@unmoved_on_failure()
def replace_head(
    model: nn.Module,
    new: int | nn.Module,
    *,
    path: str | None = None,
    keep: Mapping[int, int] | Mapping[str, int] | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return `model` with another classifier. The structure of `model` stays as it is; all other weights are shared.

    The new layer has the device, the dtype and the mode of the old one, and fresh weights from torch's random state.
    Of a network with several classifiers (distilled ones, and the auxiliary ones of Inception and GoogLeNet, which run
    only in training) each gets a new one. What the network says about its width follows: `num_classes`, and
    `num_labels` and the labels of a Hugging Face configuration, so that the network's own loss goes on working.

    Args:
        model: Any module.
        new: The number of classes K, for a layer of the same kind as the old one that gives (N, K); or a module.
        path: Path of the layer to replace; found by `find_heads` where not given.
        keep: Which old class becomes which new one, as in `{0: 0, 1: 2}`; old ones also by name, where the model's
            card has names. Their rows of weights and biases are copied bit for bit, so that a class can join without
            the others being forgotten: their scores stay as they were, up to the rounding of a matrix product of
            another width.
        inputs: What the forward takes, to find the head and for the check; guessed where not given, see `summary`.

    Raises:
        EditError: The head is of a kind that cannot be built for another number of classes, does not fit, or has no
            such classes to keep. Nothing was changed.
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
    if not isinstance(new, nn.Module):
        new = operator.index(new)  # a number of NumPy's, too
    if isinstance(new, int) and new < 1:
        raise EditError(f"a head needs at least 1 output, not {new}. Nothing was changed.")
    if path is None and isinstance(new, int) and not keep and getattr(model, "num_classes", None) == 0:
        edited = _with_its_own_classifier(model, new, inputs)
        if edited is not None:
            return finish(edited, "replace_head", new_outputs=True, new=new)
    paths = [path] if path is not None else [*find_heads(model, inputs), *find_auxiliary_heads(model, inputs)]
    pairs = _pairs(model, keep or {})
    made = {head: _new_head(model, head, _own(new, position), inputs) for position, head in enumerate(paths)}
    edited = with_layers(model, made)
    what = f"replace the head {', '.join(map(repr, made))}"
    found = prove(edited, model, what, inputs)
    settled(edited, made, found, what)
    rows = [row for head, layer in made.items() for row in _kept_rows(model.get_submodule(head), layer, head, pairs)]
    with torch.no_grad():
        for ours, theirs in rows:
            theirs[list(pairs.values())] = ours[list(pairs)].to(theirs.dtype)
    classes = new if isinstance(new, int) else _width(found)
    if classes is not None:
        _tell_width(edited, paths, width_of(model.get_submodule(paths[0])), classes, is_sure=path is None)
    where = paths[0] if len(paths) == 1 else None  # several are found again as they were here
    return finish(edited, "replace_head", new_outputs=True, path=where, new=new)


def _with_its_own_classifier(model: nn.Module, classes: int, inputs: Inputs | None) -> nn.Module | None:
    """Give a network of timm that came without a classifier the one that its class builds; None for all others."""
    if not callable(getattr(model, "reset_classifier", None)):
        return None
    edited = shared_copy(model)
    known = {id(layer) for layer in edited.modules()}
    flags = {parameter: parameter.requires_grad for parameter in edited.parameters()}
    try:
        cast(Any, edited).reset_classifier(classes)
    except Exception:  # anybody's code: the head is then found as in other networks
        return None
    finally:
        for parameter, flag in flags.items():  # which `model` shares
            parameter.requires_grad_(flag)
    if all(parameter in flags for parameter in edited.parameters()):
        return None
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    for layer in [layer for layer in edited.modules() if id(layer) not in known]:
        layer.train(model.training)
        if reference is not None:
            layer.to(reference.device, reference.dtype)
    prove(edited, model, f"give {type(model).__name__} a head for {classes} classes", inputs)
    return edited


def _tell_width(model: nn.Module, heads: Sequence[str], before: int | None, classes: int, *, is_sure: bool) -> None:
    """Set what a network keeps of its width beside the layer, in place.

    Where it is not sure that the layer is the main head, only what spoke of a head of that width.
    """
    for owner in ["", *dict.fromkeys(path for head in heads for path in ancestors(head))]:
        attributes = vars(model.get_submodule(owner))
        for name in COUNTS:
            spoke_of_it = attributes.get(name) in (before, 0) or (before is None and not owner)
            if isinstance(attributes.get(name), int) and (spoke_of_it or (is_sure and not owner)):
                attributes[name] = classes
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "id2label") or not hasattr(config, "label2id"):
        return  # Hugging Face's, whose `num_labels` counts these
    if is_sure or before in (None, len(config.id2label)):
        config.id2label = {index: f"LABEL_{index}" for index in range(classes)}
        config.label2id = {label: index for index, label in config.id2label.items()}
        if 1 in (before, classes) and before != classes:  # between a number and classes; the loss chooses anew
            config.problem_type = None


def _pairs(model: nn.Module, keep: Mapping[int, int] | Mapping[str, int]) -> dict[int, int]:
    """Return which old class becomes which new one, both as numbers."""
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


def _kept_rows(
    old: nn.Module, new: nn.Module, path: str, pairs: Mapping[int, int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the tensors of the old and of the new head in which rows stand for classes; none where none are kept."""
    if not pairs:
        return []
    tensors = [(getattr(old, name, None), getattr(new, name, None)) for name in ("weight", "bias")]
    found = [(ours, theirs) for ours, theirs in tensors if ours is not None and theirs is not None]
    are_alike = all((ours is None) == (theirs is None) for ours, theirs in tensors)
    have, want = width_of(old), width_of(new)
    if have is None or want is None or not are_alike or any(a.shape[1:] != b.shape[1:] for a, b in found):
        raise EditError(
            f"no classes of '{path}' can be kept: it is a {type(old).__name__}, and another {type(new).__name__} takes "
            "its place. Give a number of classes. Nothing was changed."
        )
    for known, others, limit in (("old", pairs.keys(), have), ("new", pairs.values(), want)):
        for index in others:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < limit:
                raise EditError(
                    f"keep names the {known} class {index!r}, expected a number from 0 to {limit - 1} "
                    f"('{path}' has {have} classes, its successor {want}). Nothing was changed."
                )
    return found


def _own(new: int | nn.Module, position: int) -> int | nn.Module:
    """Give each of several heads a module of its own, so that their weights are not tied."""
    return copy.deepcopy(new) if position and isinstance(new, nn.Module) else new


def _new_head(model: nn.Module, path: str, new: int | nn.Module, inputs: Inputs | None) -> nn.Module:
    old = layer_at(model, path)
    reference = next(old.parameters(), next(model.parameters(), None))
    if isinstance(new, nn.Module):
        layer = new
    elif isinstance(old, nn.LazyLinear):
        layer = nn.LazyLinear(new, bias=old.bias is not None)
    elif isinstance(old, nn.Linear):
        layer = nn.Linear(old.in_features, new, bias=old.bias is not None)
    elif isinstance(old, nn.Identity):
        layer = nn.Linear(_width_into(model, path, inputs), new)
    elif isinstance(old, CONVOLUTIONS) and old.groups == 1:
        layer = _convolution(old, new)
    else:
        raise EditError(
            f"the head '{path}' is a {type(old).__name__}, which cannot be built for {new} classes. "
            "Pass a module in its place, or the path of another layer. Nothing was changed."
        )
    return place(layer, reference).train(old.training)


def _convolution(old: nn.Conv1d | nn.Conv2d | nn.Conv3d, classes: int) -> nn.Module:
    kind: Any = next(kind for kind in CONVOLUTIONS if isinstance(old, kind))
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    settings = {name: getattr(old, name) for name in names}
    return kind(old.in_channels, classes, bias=old.bias is not None, **settings)


def _width_into(model: nn.Module, path: str, inputs: Inputs | None) -> int:
    """Return the number of features D that the layer at `path` is given as (N, D)."""
    shapes: Collection[Any] = next(
        (call.input_shapes for call in trace(model, inputs=inputs).calls if call.path == path), ()
    )
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        given = ", ".join(map(str, shapes)) or "nothing"
        raise EditError(
            f"the head '{path}' is given {given}, expected features (N, D). Pass a module in its place. "
            "Nothing was changed."
        )
    return next(iter(shapes))[1]


def _width(found: Trace | None) -> int | None:
    """Return K where a network gives one tensor of scores (N, K)."""
    shapes = next((call.output_shapes for call in found.calls if call.path == ""), ()) if found is not None else ()
    return shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else None
