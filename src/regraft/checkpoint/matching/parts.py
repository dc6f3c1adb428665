"""Join the state dicts of a file that keeps one for each part of a network, as `{"encoder": …, "decoder": …}`.

The key of a part names its layer: `encoder_state_dict` means the layer `encoder`, at any depth of the model. A part
whose key names no layer goes to the only layer where all its names and shapes fit, or to the root if its key is a
usual one (`model`). A part without a layer keeps its key in front of its names, so that no tensor is lost: `mapping`
proposes what it can, and the report names the rest.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile

from regraft.checkpoint.foreign.state_dicts import WRAPPERS, StateDict, Tensors
from regraft.checkpoint.matching.naming import Shapes, strip_wrapper_parts

ENDING = re.compile(
    r"[._](state_?dict|state|sd|weights?|params?|parameters|model|net|network|module|ckpt)$", re.IGNORECASE
)
BEGINNING = re.compile(r"^(state_?dict|sd|weights|params|model|net|network)[._]", re.IGNORECASE)
HALF = 0.5  # minimum share of the names of a part that fit below the layer of its key
MIN_PARTS = 2


def joined_parts(entries: Sequence[StateDict], model_shapes: Shapes) -> list[StateDict]:
    """Return a state dict for each group of parts that share a parent key in a file, with the names of the model.

    Args:
        entries: All state dicts of a file. Averages of the weights do not count as parts.
        model_shapes: Shape by name in the model.
    """
    return [joined for group in _groups(entries) if (joined := _join(group, model_shapes)) is not None]


def _groups(entries: Sequence[StateDict]) -> Iterator[list[StateDict]]:
    """List, for each common key, the state dicts below it and the one at it."""
    parents = {entry.path[:depth] for entry in entries for depth in range(len(entry.path))}
    for parent in sorted(parents, key=lambda path: (len(path), path)):
        below = [entry for entry in entries if entry.path[: len(parent)] == parent]
        if not StateDict(parent, {}).is_average:
            below = [entry for entry in below if not entry.is_average]
        if len(below) >= MIN_PARTS and _common_path(below) == parent:
            yield below


def _join(parts: Sequence[StateDict], model_shapes: Shapes) -> StateDict | None:
    """Join parts; None if no part has a layer, several belong to the root, or two have the same name."""
    common = _common_path(parts)
    tensors: Tensors = {}
    sources: dict[str, str] = {}
    placed = []
    roots = 0
    for part in parts:
        keys = part.path[len(common) :]
        names = strip_wrapper_parts(part.tensors)
        shapes = {names[name]: tuple(tensor.shape) for name, tensor in part.tensors.items()}
        place = _layer_of(keys, shapes, model_shapes)
        if place is None:
            place = ".".join(keys)
        else:
            placed.append(part)
        roots += place == "" and bool(keys)
        prefix = f"{place}." if place else ""
        for name, tensor in part.tensors.items():
            if prefix + names[name] in tensors:
                return None  # two parts with one name are alternatives, such as a student and a teacher
            tensors[prefix + names[name]] = tensor
            sources[prefix + names[name]] = ".".join([*keys, name])
    if not placed or roots > 1:
        return None
    is_ordered = all(part.is_ordered for part in parts)
    return StateDict(common, tensors, is_ordered, parts=tuple(part.key for part in parts if part.path), sources=sources)


def _layer_of(keys: Sequence[str], shapes: Shapes, model_shapes: Shapes) -> str | None:
    """Return the path of the layer that a part belongs to, `""` for the root; None if ambiguous."""
    if not keys:
        return ""
    layers = {name[: dot.start()] for name in model_shapes for dot in re.finditer(r"\.", name)}
    for spelling in _spellings(keys):
        known = [layer for layer in layers if f".{layer}".lower().endswith(f".{spelling}".lower())]
        fits = {layer: _share_that_fits(shapes, model_shapes, layer) for layer in known}
        best = max(fits.values(), default=0.0)
        chosen = [layer for layer, fit in fits.items() if fit == best]
        if best >= HALF and len(chosen) == 1:
            return chosen[0]
    if keys[-1] in WRAPPERS and _share_that_fits(shapes, model_shapes, "") >= HALF:
        return ""
    whole = [layer for layer in ("", *layers) if _share_that_fits(shapes, model_shapes, layer) == 1]
    return whole[0] if len(whole) == 1 else None


def _spellings(keys: Sequence[str]) -> tuple[str, ...]:
    """List the layer names that keys may refer to, the most literal first."""
    text = ".".join(keys)
    short = ENDING.sub("", text)
    return text, short, BEGINNING.sub("", short), ENDING.sub("", keys[-1])


def _share_that_fits(shapes: Shapes, model_shapes: Shapes, layer: str) -> float:
    """Return the share of names, from 0 to 1, that the model has below a layer with equal shapes."""
    prefix = f"{layer}." if layer else ""
    return sum(model_shapes.get(prefix + name) == shape for name, shape in shapes.items()) / max(1, len(shapes))


def _common_path(parts: Sequence[StateDict]) -> tuple[str, ...]:
    columns = zip(*(part.path for part in parts), strict=False)
    return tuple(keys[0] for keys in takewhile(lambda keys: len(set(keys)) == 1, columns))
