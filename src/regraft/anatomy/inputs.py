"""Example inputs for tracing: the caller's, or guessed from the layers and the configuration of the model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from regraft.card import card_of
from regraft.errors import ArgumentError, ModelError
from regraft.torch_internals import ConvBase, tree_leaves, tree_map
from regraft.zoo import preprocessing_of

Shape = tuple[int, ...]
Inputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
InputSize = Sequence[int] | Sequence[Sequence[int]]

MAX_CHANNELS = 16  # of an image, as satellites take them
TOKENS = 16  # length of a sequence where nothing says how long one is
FRAMES = 16  # of a video
IMAGE_SIDE = 224  # pixels


@dataclass(frozen=True)
class Arguments:
    """Arguments of a forward. A tensor on the meta device stands for any tensor of its shape.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        are_values_given: Whether the values are the caller's, not generated.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    are_values_given: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all tensors, positional ones first."""
        return shapes_of((self.args, self.kwargs))

    def without_values(self) -> "Arguments":
        """Replace each tensor by an empty one; inside of `meta_copy` or `fake_copy` these hold no memory."""
        return self.mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))

    def with_values(self, device: torch.device) -> "Arguments":
        """Copy given values to `device`, and draw values for meta tensors; those of integer dtype are 0."""
        return self.mapped(
            lambda tensor: _filled(tensor, device) if tensor.is_meta else tensor.detach().to(device, copy=True)
        )

    def of_batch(self, count: int) -> "Arguments":
        """Replace each tensor by an empty one, with `count` rows where it has one row for each image."""
        rows = self._rows
        return self.mapped(
            lambda tensor: (
                torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype)
                if _has_rows(tensor, rows)
                else torch.empty(tensor.shape, dtype=tensor.dtype)
            )
        )

    def drawn(self, count: int, device: torch.device) -> "Arguments":
        """Draw random inputs for a batch of `count`, like the given ones.

        Floating-point numbers are drawn from the standard normal distribution. Whole numbers lie between the least and
        the greatest of the given ones; where these are no more than 1 (a mask), the given rows are repeated.
        """
        rows = self._rows

        def draw(tensor: torch.Tensor) -> torch.Tensor:
            if not _has_rows(tensor, rows):
                return tensor.detach().to(device, copy=True) if not tensor.is_meta else _filled(tensor, device)
            shape = (count, *tensor.shape[1:])
            if tensor.is_floating_point() or tensor.is_complex():
                return torch.randn(shape, dtype=tensor.dtype, device=device)
            if tensor.is_meta or not tensor.numel():
                return torch.zeros(shape, dtype=tensor.dtype, device=device)
            if tensor.max() > 1:
                low, high = int(tensor.min()), int(tensor.max())
                return torch.randint(low, high + 1, shape, device=device).to(tensor.dtype)
            return tensor.detach()[torch.arange(count, device=tensor.device) % len(tensor)].to(device)

        return self.mapped(draw)

    @property
    def _rows(self) -> int | None:
        """The number of rows of the first tensor, which is that of images."""
        shape = next((shape for shape in self.shapes if shape), None)
        return shape[0] if shape else None

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Arguments":
        """Return the arguments with `change` applied to each tensor."""
        args, kwargs = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, (self.args, self.kwargs)
        )
        return Arguments(args, kwargs, self.are_values_given)


def arguments_for(model: nn.Module, input_size: InputSize | None = None, inputs: Inputs | None = None) -> Arguments:
    """Return the arguments to call `model` with; see `trace` for the parameters.

    Raises:
        ModelError: Both `input_size` and `inputs` were given, or one of them is of a wrong kind.
    """
    if inputs is not None and input_size is not None:
        raise ModelError("both input_size and inputs were given. Pass one of them: inputs have shapes of their own.")
    if isinstance(inputs, torch.Tensor):
        return Arguments((inputs,), are_values_given=True)
    if isinstance(inputs, tuple):
        return Arguments(inputs, are_values_given=True)
    if isinstance(inputs, Mapping):
        return Arguments(kwargs=dict(inputs), are_values_given=True)
    if inputs is not None:
        raise ModelError(
            f"inputs is a {type(inputs).__name__}, expected a tensor, a tuple of positional inputs or a dict of "
            "keyword inputs. If forward takes it as it is, pass a tuple around it."
        )
    if input_size is not None:
        dtype = _input_dtype(model)
        return Arguments(tuple(_any_tensor(shape, dtype) for shape in _shapes_in(input_size)))
    return _hugging_face_arguments(model) or Arguments((_any_tensor(guess_input_size(model), _input_dtype(model)),))


def guess_input_size(model: nn.Module) -> Shape:
    """Guess the shape of one input, batch included, from the first layer that has a width.

    An image for a network that convolves, a sequence for one that looks up words or recurs, else a vector.
    """
    first = _first_layer(model)
    if isinstance(first, (nn.Embedding, nn.EmbeddingBag)):
        return (1, TOKENS)
    if isinstance(first, nn.RNNBase):
        return (1, TOKENS, first.input_size)
    model = _described_network(model)
    takes_images = _describes_images(model)
    if isinstance(first, nn.Linear) and first.in_features and not takes_images:
        return (1, first.in_features)
    preprocessing = preprocessing_of(model)
    if isinstance(first, (nn.Conv1d, nn.ConvTranspose1d)):
        return (1, first.in_channels or 1, preprocessing.size)
    if isinstance(first, (nn.Conv3d, nn.ConvTranspose3d)):
        return (1, first.in_channels or 3, FRAMES, preprocessing.size, preprocessing.size)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else 0
    if not 0 < channels <= MAX_CHANNELS:  # unknown yet, or registered first but no stem of images
        channels = preprocessing.channels
    return (1, channels, *(_own_sides(model) or (preprocessing.size, preprocessing.size)))


def _described_network(model: nn.Module) -> nn.Module:
    """Return the outermost module of `model` that describes the images that it takes; `model` where there is none."""
    return next((layer for layer in model.modules() if _describes_images(layer) or _own_sides(layer)), model)


def _describes_images(model: nn.Module) -> bool:
    """Return whether a module has a card, a preprocessing or a configuration of timm's."""
    has_card = card_of(model).preprocessing is not None
    return has_card or hasattr(model, "preprocessing") or isinstance(getattr(model, "pretrained_cfg", None), dict)


def example_arguments(model: nn.Module, example: Any) -> Arguments:
    """Return the arguments that an example of what a forward takes stands for.

    A tuple is one of positional inputs, a mapping one of keyword inputs, unless the forward takes it as it is.

    Raises:
        ArgumentError: A list or mapping holds itself.
    """
    try:
        shapes_of(example)
    except RecursionError as error:
        raise ArgumentError("the example of the inputs is nested too deeply: a list in it holds itself.") from error
    as_one = Arguments((example,), are_values_given=True)
    if isinstance(example, tuple):
        return Arguments(example, are_values_given=True)
    if not isinstance(example, Mapping):
        return as_one
    try:
        inspect.signature(model.forward).bind(**example)
    except TypeError:
        return as_one
    return Arguments(kwargs=dict(example), are_values_given=True)


def _own_sides(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of images that a network stores, as vision transformers do; None for others."""
    if card_of(model).preprocessing is not None:
        return None
    for layer in (model, *model.children()):
        for name in ("image_size", "img_size"):
            value = getattr(layer, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value, value
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value):
                return value[0], value[1]
    return None


def shapes_of(value: Any) -> tuple[Shape, ...]:
    """List the shapes of all tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape),)
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _shapes_in(input_size: InputSize) -> list[Shape]:
    parts = list(input_size)
    if all(isinstance(part, int) and part >= 0 for part in parts):
        return [tuple(cast("list[int]", parts))]
    if all(isinstance(part, Sequence) and all(isinstance(n, int) and n >= 0 for n in part) for part in parts):
        return [tuple(part) for part in cast("list[Sequence[int]]", parts)]
    raise ModelError(
        f"input_size {input_size!r} is no shape. Expected numbers as in (1, 3, 224, 224), or several such."
    )


def _has_rows(tensor: torch.Tensor, rows: int | None) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


def _filled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def _any_tensor(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _first_layer(model: nn.Module) -> nn.Module | None:
    known = (nn.Linear, ConvBase, nn.Embedding, nn.EmbeddingBag, nn.RNNBase)
    return next((layer for layer in model.modules() if isinstance(layer, known)), None)


def _input_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the inputs of `model`: int64 for token indices, else that of its first floating parameter."""
    if isinstance(_first_layer(model), (nn.Embedding, nn.EmbeddingBag)):
        return torch.int64
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _hugging_face_arguments(model: nn.Module) -> Arguments | None:
    """Return the inputs that a Hugging Face model declares; None for other models, and where it declares none."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(name, str) or not hasattr(type(model), "dummy_inputs"):
        return None
    if name == "pixel_values":
        shape = _image_shape(config)
    elif name == "input_features":
        shape = _sound_shape(config)
    else:
        return _dummy_arguments(model)
    if shape is None:
        return None
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    kwargs = {name: _any_tensor(shape, next(dtypes, torch.get_default_dtype()))}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        kwargs["decoder_input_ids"] = _any_tensor((1, TOKENS), torch.int64)
    return Arguments(kwargs=kwargs)


def _dummy_arguments(model: nn.Module) -> Arguments | None:
    try:
        dummy = cast(Any, model).dummy_inputs
    except Exception:  # a property of a class of another library, which may raise anything
        return None
    return Arguments(kwargs=dict(dummy)) if isinstance(dummy, Mapping) and dummy else None


def _image_shape(config: Any) -> Shape | None:
    own = getattr(config, "vision_config", None) or config
    side, channels = getattr(own, "image_size", None) or IMAGE_SIDE, getattr(own, "num_channels", 3)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return (1, channels, *sides) if isinstance(channels, int) and len(sides) == 2 else None


def _sound_shape(config: Any) -> Shape | None:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return (1, bins, 2 * positions) if isinstance(bins, int) and isinstance(positions, int) else None
