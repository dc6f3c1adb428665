"""Find the two ends of a network: its classifier and its first convolution."""

from torch import nn
from torch.nn.modules.conv import _ConvNd

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within
from regraft.anatomy.tracing import trace
from regraft.errors import EditError, ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDE = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.MultiheadAttention, _ConvNd)


def find_heads(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Return the paths of the classifier layers of `model`: one, or several for networks that average several.

    timm's networks name theirs. In all others it is the last layer with parameters in execution order.

    Raises:
        EditError: No layer has parameters.
    """
    layers = [path for path, layer in model.named_modules() if path and next(layer.parameters(False), None) is not None]
    if not layers:
        raise EditError(f"{type(model).__name__} has no layer with parameters, so it has no head to replace.")
    try:
        ended = {call.path: call.ended for call in trace(model, inputs=inputs).calls}
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


def find_auxiliary_heads(model: nn.Module, inputs: Inputs | None = None) -> list[str]:
    """Return the paths of classifiers that run only while the network trains, as those of Inception and GoogLeNet.

    These are layers that an evaluation never runs, give as many outputs as the main classifier, and come last in their
    top-level layer.
    """
    try:
        executed = {call.path for call in trace(model, inputs=inputs).calls}
    except ModelError:
        return []
    widths = {width_of(model.get_submodule(path)) for path in find_heads(model, inputs)}
    last: dict[str, str] = {}
    for path, layer in model.named_modules():
        if path and next(layer.parameters(False), None) is not None:
            last[path.partition(".")[0]] = path
    idle = [path for top, path in last.items() if top not in executed and path not in executed]
    return [path for path in idle if width_of(model.get_submodule(path)) in widths - {None}]


def first_convolution(model: nn.Module) -> str:
    """Return the path of the first layer of `model` that has a width, which takes its images.

    Raises:
        EditError: That layer is no convolution, or takes something that was made of the images.
    """
    layers = dict(model.named_modules())
    try:
        calls = trace(model).calls
        order, given = [call.path for call in calls], {call.path: call.input_shapes for call in reversed(calls)}
    except ModelError:
        order, given = list(layers), {}
    first = next((path for path in order if isinstance(layers[path], WIDE)), None)
    layer = layers[first] if first is not None else None
    if isinstance(layer, CONVOLUTIONS) and first is not None:
        fed = {shape[1:2] for shape in given.get("", ())}
        if not fed or (layer.in_channels,) in fed:
            return first
    kind = f"'{first}' ({type(layer).__name__})" if layer is not None else "no layer with a width"
    if isinstance(layer, CONVOLUTIONS):
        kind += f", which takes {layer.in_channels} channels that are made of the image"
    raise EditError(
        f"{type(model).__name__} begins with {kind}, expected a convolution of the image, so it has no channels to "
        "change. Use replace(model, PATH, …). Nothing was changed."
    )


def width_of(layer: nn.Module) -> int | None:
    """Return how many outputs a linear layer or a convolution gives; None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) else None
