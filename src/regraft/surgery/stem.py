"""Change the number of input channels of a network."""

import copy
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from regraft.anatomy.dataflow.graph import ancestors
from regraft.anatomy.heads import CONVOLUTIONS, first_convolution
from regraft.anatomy.inputs import Inputs, arguments_for
from regraft.anatomy.tracing import LazyTrace, trace
from regraft.arguments import check_arguments
from regraft.card import attach
from regraft.errors import EditError, ForwardError
from regraft.surgery.checks import finish, refusal, require_editable
from regraft.surgery.swap import with_layers
from regraft.torch_internals import parameters_of, tree_map
from regraft.zoo import preprocessing_of

COUNTS = ("in_chans", "in_channels", "num_channels")  # attributes in which networks store the number of input channels
TIMM_CONFIGS = ("pretrained_cfg", "default_cfg")
CLOSE = 1e-4  # relative to the largest output, in float64: above the eps that layers add against division by zero


def replace_stem(model: nn.Module, channels: int, *, inputs: Inputs | None = None) -> nn.Module:
    """Return `model` with a first convolution for another number of channels, which keeps what the filters learned.

    One channel: each filter becomes the sum of itself over the old channels, so that a gray image gives what three
    equal channels gave, up to rounding. More channels: the old ones keep their filters bit for bit, and the new ones
    begin with zeros, so that the network answers as before until it has learned to use them (timm repeats the filters
    over the new channels and scales them down, which answers otherwise from the start). Fewer, but more than one: the
    first ones stay, times old / new, so that they weigh as much as all did.

    Where several convolutions read the image side by side, all of them change. Bias, stride, padding, dilation and
    the flags of what is frozen stay. The preprocessing on the card follows: for one channel, mean and standard
    deviation are averaged; for a number that is neither 1 nor 3 there is none.

    Args:
        model: A network whose first layer with a width is a convolution.
        channels: Number of channels C of the new inputs (N, C, …).
        inputs: One of the new inputs, for the check; guessed where not given, see `summary`.

    Raises:
        EditError: The network begins otherwise, its first convolution has groups (other than for 1 channel) or
            computes its filters from other weights, or what follows needs the old channels. Nothing was changed.

    >>> gray = replace_stem(nn.Sequential(nn.Conv2d(3, 8, 3)), 1)
    >>> gray[0].in_channels
    1
    """
    check_arguments(replace_stem, locals())
    require_editable(model)
    if channels < 1:
        raise EditError(f"a network takes at least 1 channel, not {channels}. Nothing was changed.")
    first = first_convolution(LazyTrace(model))
    count = cast(nn.Conv2d, model.get_submodule(first)).in_channels
    edited = with_layers(model, {})
    changed: list[str] = []
    path: str | None = first
    while path is not None:  # one more for each convolution that reads the image beside the first
        _widen(edited.get_submodule(path), path, channels)
        changed.append(path)
        _set_channel_attributes(edited, changed, count, channels)
        path = _unchanged_convolution(edited, model, channels, count, changed, inputs)
    if isinstance(edited.get_submodule(first), nn.Conv2d):
        attach(edited, preprocessing=_preprocessing(preprocessing_of(model), count, channels))
    return finish(edited, model, "replace_stem", new_outputs=False, channels=channels)


def filters_for(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the filters of a convolution for another number of channels, as `replace_stem` describes.

    Args:
        weight: Filters (out, in, …).
        channels: Number of channels C of the new ones (out, C, …).
    """
    count = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    if channels > count:
        zeros = weight.new_zeros(len(weight), channels - count, *weight.shape[2:])
        return torch.cat([weight, zeros], 1)
    return (weight[:, :channels] * (count / channels)).contiguous()


def _unchanged_convolution(
    edited: nn.Module, model: nn.Module, channels: int, count: int, changed: Collection[str], inputs: Inputs | None
) -> str | None:
    """Run the edited network on shapes; return a convolution that gets the new channels but expects the old ones.

    Raises:
        EditError: It fails for any other reason, although the original runs.
    """
    try:
        trace(edited, inputs=inputs if inputs is not None else _with_channels(model, count, channels))
        return None
    except ForwardError as error:
        failure = error
    layer = edited.get_submodule(failure.path) if failure.path else edited
    is_old = isinstance(layer, CONVOLUTIONS) and layer.in_channels == count and failure.path not in changed
    if is_old and any(shape[1:2] == (channels,) for shape in failure.given):
        return failure.path
    if inputs is None:
        try:
            trace(model)
        except ForwardError:  # the original fails as well, so the edit is not the reason
            return None
    raise refusal(edited, f"give {', '.join(map(repr, changed))} {channels} channels", failure) from failure


def _with_channels(model: nn.Module, count: int, channels: int) -> Inputs:
    """Return the guessed inputs of the network, without values, with the new number of channels."""

    def with_channels(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim < 2 or leaf.shape[1] != count:
            return leaf
        return torch.empty(leaf.shape[0], channels, *leaf.shape[2:], dtype=leaf.dtype, device="meta")

    guessed = arguments_for(model)
    args, kwargs = tree_map(with_channels, (guessed.args, guessed.kwargs))
    return args or kwargs


def _widen(layer: nn.Module, path: str, channels: int) -> None:
    """Give a convolution another number of input channels, in place.

    Raises:
        EditError: Its filters cannot be kept.
    """
    assert isinstance(layer, CONVOLUTIONS)
    count = layer.in_channels
    if count == channels:
        return
    advice = f"Use replace(model, '{path}', …) with a layer of your own. Nothing was changed."
    if layer.groups != 1 and channels != 1:
        raise EditError(
            f"the first convolution '{path}' has {layer.groups} groups, each with channels of its own, so what it "
            f"learned can be kept for 1 channel, not for {channels}. {advice}"
        )
    computed = f"the first convolution '{path}' ({type(layer).__name__}) computes its filters from other weights, "
    if "weight" not in parameters_of(layer):
        raise EditError(f"{computed}which has to be removed before. {advice}")
    old = copy.deepcopy(layer)
    weight = layer.weight.detach()  # (out, in / groups, …)
    filters = filters_for(weight, channels)
    layer.in_channels, layer.groups = channels, 1
    layer.weight = nn.Parameter(filters, requires_grad=layer.weight.requires_grad)
    if not weight.is_meta and not _agree(old, layer):
        raise EditError(f"{computed}as with weight standardization, so what it gives would change. {advice}")


@torch.no_grad()
def _agree(old: Any, new: Any) -> bool:
    """Return whether a changed convolution gives the outputs of the old one, on equivalent random inputs."""
    old, new = copy.deepcopy(old).cpu().double(), copy.deepcopy(new).cpu().double()
    sides = [step * (size - 1) + 3 for size, step in zip(old.kernel_size, old.dilation, strict=True)]
    draw = torch.rand(1, new.in_channels, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if new.in_channels == 1:
        shown = draw.expand(-1, old.in_channels, *sides)
    elif new.in_channels > old.in_channels:
        shown = draw[:, : old.in_channels]
    else:
        missing = draw.new_zeros(1, old.in_channels - new.in_channels, *sides)
        shown = torch.cat([draw * (old.in_channels / new.in_channels), missing], 1)
    output, expected = new(draw), old(shown)
    return bool((output - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=1e-12))


def _set_channel_attributes(model: nn.Module, paths: Collection[str], count: int, channels: int) -> None:
    """Update the attributes and configurations that store the number of input channels, in place."""
    for owner in ["", *dict.fromkeys(outer for path in paths for outer in ancestors(path))]:
        attributes = vars(model.get_submodule(owner))
        for name in COUNTS:
            if attributes.get(name) == count:
                attributes[name] = channels
    config: Any = getattr(model, "config", None)  # Hugging Face's
    for part in (config, getattr(config, "vision_config", None)):
        if part is not None and getattr(part, "num_channels", None) == count:
            part.num_channels = channels
    for name in TIMM_CONFIGS:  # which also name the first convolution; it keeps its name
        known = vars(model).get(name)
        if isinstance(known, dict) and "input_size" in known:
            size = (channels, *known["input_size"][1:])
            vars(model)[name] = {**known, "input_size": size, **_averaged(known, channels)}


def _preprocessing(known: Any, count: int, channels: int) -> Any:
    """Return the preprocessing for the new number of channels; None where nothing is known of them."""
    if channels == known.channels:
        return known
    if channels == 1 and known.channels == count:
        return known.model_copy(update=_averaged({"mean": known.mean, "std": known.std}, 1))
    is_from_gray = channels == 3 and known.channels == 1
    return known.model_copy(update={"mean": known.mean * 3, "std": known.std * 3}) if is_from_gray else None


def _averaged(values: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return the averages over the channels of mean and standard deviation, for gray images; empty for others."""
    if channels != 1:
        return {}
    return {name: (sum(values[name]) / len(values[name]),) for name in ("mean", "std") if values.get(name)}
