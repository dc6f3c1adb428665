"""Find the classifier of a network."""

from torch import nn

from regraft.anatomy.paths import is_within
from regraft.anatomy.tracing import trace
from regraft.errors import EditError, ModelError


def find_heads(model: nn.Module) -> list[str]:
    """Return the paths of the classifier layers of `model`: one, or several for networks that average several.

    timm's networks name theirs. In all others it is the last layer with parameters in execution order.

    Raises:
        EditError: No layer has parameters.
    """
    layers = [path for path, layer in model.named_modules() if path and next(layer.parameters(False), None) is not None]
    if not layers:
        raise EditError(f"{type(model).__name__} has no layer with parameters, so it has no head to replace.")
    try:
        ended = {call.path: call.ended for call in trace(model).calls}
    except ModelError:  # cannot run on shapes: the order of registration is all that is known
        ended = {path: position for position, path in enumerate(layers)}
    executed = [path for path in layers if path in ended] or layers
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    branches = [named] if isinstance(named, str) else list(named or [])
    heads = []
    for branch in branches or [""]:
        inside = [path for path in executed if is_within(path, branch)]
        if inside:
            heads.append(max(inside, key=lambda path: ended.get(path, -1)))
        elif branch in ended:  # an Identity, where the network came without a classifier
            heads.append(branch)
    return heads or [max(executed, key=lambda path: ended.get(path, -1))]
