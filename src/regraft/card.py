"""The card: metadata of a model, as plain data.

A card is stored with the module (as the attribute `regraft_card`, which survives `deepcopy` and `torch.save` and is not
part of the state dict) and in the header of a checkpoint. It holds the recipe that rebuilds the architecture, the
preprocessing of images, the class names and the last metrics.
"""

import base64
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from torch import nn

from regraft.fields import CheckedFields
from regraft.train_options import Engine

ATTRIBUTE = "regraft_card"


class _FrozenFields(CheckedFields):
    model_config = ConfigDict(frozen=True, extra="allow")  # keeps the fields of a newer version


class Source(_FrozenFields):
    """The origin of an architecture and of its initial weights.

    Attributes:
        name: `"resnet18"`, `"timm/NAME"`, `"py:FILE_OR_MODULE:Class"`, or `"torch.nn"` for the layers in `layers`.
        weights: `"none"`, a registered name such as `"IMAGENET1K_V1"`, or the name of a file.
        layers: A layer expression such as `"Sequential(Linear(8, 4), ReLU())"`; None for a network with a name.
        parts: For a network joined from several (`"stitch"`, `"graft"`), their recipes.
        arguments: How the parts are joined, as JSON data.
    """

    name: str
    weights: str = "none"
    layers: str | None = None
    parts: tuple["Recipe", ...] = ()
    arguments: dict[str, Any] = Field(default_factory=dict)


class Step(_FrozenFields):
    """One edit: the name of the public function, and its arguments except the model, as JSON data.

    Layers are text, as in `"Linear(512, 10)"`.
    """

    operation: Literal["append", "insert", "remove", "replace", "replace_head", "replace_stem", "truncate"]
    arguments: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operation}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class Recipe(_FrozenFields):
    """A source and the edits that were applied to it, in order."""

    source: Source
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> "Recipe":
        """Return this recipe with one more step."""
        return self.model_copy(update={"steps": (*self.steps, step)})


Source.model_rebuild()


class Preprocessing(_FrozenFields):
    """The conversion of an image file to the input tensor of a network.

    The image is resized to `resize` according to `crop_mode`, cropped at its center to `size` × `size` pixels (with a
    border if it is smaller), scaled to [0, 1], and normalized per channel.

    Attributes:
        size: Side of the square input, in pixels.
        resize: Length of the resized side before the crop, in pixels.
        mean: Subtracted per channel; its length is the number of channels (1: gray, 3: RGB).
        std: Divisor per channel.
        interpolation: Filter for resizing.
        crop_mode: Which side becomes `resize`. `center`: the shorter side, with a black border, as in torchvision;
            `squash`: both sides, without keeping the aspect ratio; `border`: the longer side, with a border of the
            color `mean`. Source: timm's `crop_mode`.
        decoder: Engine that decodes the file, see `TrainConfig`; they agree but for rounding.
    """

    size: int = Field(default=224, ge=1)
    resize: int = Field(default=256, ge=1)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop_mode: Literal["center", "squash", "border"] = "center"
    decoder: Engine = "pillow"

    @model_validator(mode="after")
    def _has_channels(self) -> "Preprocessing":
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(f"mean and std need 1 or 3 channels, not {len(self.mean)} and {len(self.std)}")
        return self

    @property
    def channels(self) -> int:
        """Number of channels of the images: 1 or 3."""
        return len(self.mean)

    @property
    def border(self) -> tuple[int, ...]:
        """Color of the border around an image that is smaller than the crop, 0 to 255 per channel."""
        return tuple(round(255 * value) if self.crop_mode == "border" else 0 for value in self.mean)

    def cache_key(self) -> dict[str, Any]:
        """Return what decoded pixels depend on, as JSON data; for Pillow as before there were other engines."""
        return self.model_dump(exclude={"decoder"} if self.decoder == "pillow" else None)

    def summary(self) -> str:
        """Return a description in one line."""
        sides = {"center": "shorter side", "squash": "both sides", "border": "longer side"}[self.crop_mode]
        return (
            f"{sides} to {self.resize}, middle {self.size}×{self.size}, {self.interpolation}, mean {self.mean}, "
            f"std {self.std}"
        )

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        """Shape of one image as input of the network, including the batch: (1, C, H, W)."""
        return (1, self.channels, self.size, self.size)


class Split(_FrozenFields):
    """Which photos of one folder or table were held out for validation.

    Attributes:
        samples: Digest of all of them, with their targets.
        share: Share that was held out.
        seed: Random seed of the draw.
    """

    samples: str
    share: float
    seed: int


class FamiliarPhotos(_FrozenFields):
    """What the training photos look like to a network, to tell photos that resemble none of them.

    Attributes:
        layer: Path of its head, whose inputs are compared.
        width: Number of these inputs, D.
        features: Those of some training photos, in base64: rows of D signed bytes, of which the angles count.
        distances: Distances of the validation photos from these, in ascending order, 0 to 2.
    """

    layer: str
    width: int = Field(ge=1)
    features: str = Field(repr=False)
    distances: tuple[float, ...] = Field(repr=False)

    @model_validator(mode="after")
    def _has_rows(self) -> "FamiliarPhotos":
        try:
            size = len(base64.b64decode(self.features, validate=True))
        except ValueError as error:
            raise ValueError(f"features are not base64: {error}") from error
        if size == 0 or size % self.width:
            raise ValueError(f"features have {size} bytes, which are no rows of {self.width}")
        return self


@dataclass(frozen=True)
class EditOrigin:
    """What an edited network was made from, where that had no recipe: `save` derives one, which takes a while.

    Attributes:
        networks: Copies of these networks, which share their weights.
        joined: Name and arguments of a `Source` that joins them; None for one network.
        steps: The edits since.
    """

    networks: tuple[nn.Module, ...]
    joined: tuple[str, dict[str, Any]] | None = None
    steps: tuple[Step, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "EditOrigin":
        return self  # a copy would copy weights that were cut off

    def __reduce__(self) -> tuple[Any, ...]:
        return _forget, ()  # pickling would keep them


def _forget() -> None:
    """Return None, which a pickled `EditOrigin` becomes."""


class Card(_FrozenFields):
    """The metadata of a model; each field may be unknown (None).

    Attributes:
        recipe: How to rebuild its architecture.
        preprocessing: Preprocessing of its images.
        task: The task that it was trained for.
        classes: Names of its outputs, in their order.
        metrics: Measured results, as JSON data.
        split: How the photos that it was trained on were split, where they lay in one folder or table.
        confidence_factor: Factor on its scores that makes its probabilities as sure as they are right; None is 1.
        familiar: What its training photos look like to it.
        carried: Fields in the header of its file that this version does not know; they are saved again.
        origin: What it was edited from; only without a recipe, and in no file.
    """

    recipe: Recipe | None = None
    preprocessing: Preprocessing | None = None
    task: Literal["classification", "regression"] | None = None
    classes: tuple[str, ...] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    split: Split | None = None
    confidence_factor: float | None = Field(default=None, gt=0)
    familiar: FamiliarPhotos | None = None
    carried: dict[str, Any] = Field(default_factory=dict, exclude=True)
    origin: Any = Field(default=None, exclude=True)  # an `EditOrigin`


def card_of(model: nn.Module) -> Card:
    """Return the card of `model`, or an empty one."""
    return getattr(model, ATTRIBUTE, None) or Card()


def attach(model: nn.Module, **fields: Any) -> nn.Module:
    """Update fields of the card of `model`, and return the model."""
    setattr(model, ATTRIBUTE, card_of(model).model_copy(update=fields))
    return model
