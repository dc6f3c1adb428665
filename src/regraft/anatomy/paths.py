"""Dotted paths of layers: lookup, and the nearest names for the message of an unknown one."""

from torch import nn

from regraft.errors import SelectionError, nearest

MAX_NAMED = 30  # layers in a message


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the layer of `model` at a dotted path; the empty path is the model itself.

    Raises:
        SelectionError: No layer has that path; the nearest are named.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SelectionError(no_such_layer(model, path)) from error


def no_such_layer(model: nn.Module, path: str) -> str:
    """Return the message for a path that names no layer, with the nearest names."""
    owner = path.rpartition(".")[0] or "the model itself"
    for kind, names in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        if path in dict(names):
            return f"'{path}' is a {kind} of {type(model).__name__}, not a layer. Name its layer, '{owner}'."
    known = [name for name, _ in model.named_modules() if name]
    tops = [name for name, _ in model.named_children()]
    listed = ", ".join(tops[:MAX_NAMED]) + (f" and {len(tops) - MAX_NAMED} more" if len(tops) > MAX_NAMED else "")
    hint = nearest(path, known) or f"Its top-level layers: {listed}."
    return f"no layer '{path}' in {type(model).__name__}. {hint} `regraft inspect` lists all."


def paths_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """Return the paths at which a layer lies in `model`: several of a shared one, none of one of another model."""
    return [path for path, own in model.named_modules(remove_duplicate=False) if own is layer]


def parent_and_name(path: str) -> tuple[str, str]:
    """Split a path into that of the parent and the last name.

    >>> parent_and_name("layer1.0.conv1"), parent_and_name("fc")
    (('layer1.0', 'conv1'), ('', 'fc'))
    """
    parent, _, name = path.rpartition(".")
    return parent, name


def is_within(path: str, ancestor: str) -> bool:
    """Return whether `path` is `ancestor` or lies below it.

    >>> is_within("layer1.0", "layer1"), is_within("layer10", "layer1"), is_within("fc", "")
    (True, False, True)
    """
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")
