"""The card: what a model carries about itself, as plain data.

A card travels with the module (as the attribute `regraft_card`, which survives `deepcopy` and `torch.save` and is no
part of the state dict) and in the header of a checkpoint. It holds the recipe that rebuilds the architecture, the
preprocessing of its images, the class names and the last metrics.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

ATTRIBUTE = "regraft_card"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")  # what a newer version writes outlives this one


class Source(_Plain):
    """Where an architecture and its first weights come from.

    Attributes:
        name: `"resnet18"`, `"timm/NAME"`, `"py:FILE_OR_MODULE:Class"`, or `"torch.nn"` for layers that stand in
            `layers`.
        weights: `"none"`, a registered name such as `"IMAGENET1K_V1"`, or the name of a file.
        layers: A layer expression for a network that text can describe, as in `"Sequential(Linear(8, 4), ReLU())"`;
            None for one with a name.
        parts: For a network made of several (`"stitch"`, `"graft"`), the recipes of these.
        arguments: How the parts are put together, as JSON data.
    """

    name: str
    weights: str = "none"
    layers: str | None = None
    parts: tuple["Recipe", ...] = ()
    arguments: dict[str, Any] = Field(default_factory=dict)


class Step(_Plain):
    """One edit: the public function's name, and what it was given beside the model, as JSON data.

    Layers are written as text, as in `"Linear(512, 10)"`.
    """

    operation: Literal["append", "insert", "remove", "replace", "replace_head", "replace_stem", "truncate"]
    arguments: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operation}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


class Recipe(_Plain):
    """A source and the edits that were applied to it, in order."""

    source: Source
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> "Recipe":
        """Return this recipe with one more step."""
        return self.model_copy(update={"steps": (*self.steps, step)})


Source.model_rebuild()


class Preprocessing(_Plain):
    """How an image file becomes the tensor that a network expects.

    The image is resized to `resize` as `crop_mode` says, its middle `size` × `size` pixels are kept, with a border
    where it is smaller, scaled to [0, 1], and normalized per channel.

    Attributes:
        size: Side of the square that the network sees, in pixels.
        resize: Length of the resized side before the crop, in pixels.
        mean: Subtracted per channel; its length is the number of channels (1: gray, 3: RGB).
        std: Divided by per channel.
        interpolation: Filter for resizing.
        crop_mode: `center`: the shorter side becomes `resize`, and the border is black, as in torchvision; `squash`:
            both sides do, whatever the photo's form; `border`: the longer side does, and the border has the color
            `mean`. Source: timm's `crop_mode`.
    """

    size: int = Field(default=224, ge=1)
    resize: int = Field(default=256, ge=1)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop_mode: Literal["center", "squash", "border"] = "center"

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

    def summary(self) -> str:
        """Return all of it in one line, in words."""
        sides = {"center": "shorter side", "squash": "both sides", "border": "longer side"}[self.crop_mode]
        return (
            f"{sides} to {self.resize}, middle {self.size}×{self.size}, {self.interpolation}, mean {self.mean}, "
            f"std {self.std}"
        )

    @property
    def input_size(self) -> tuple[int, int, int, int]:
        """Shape of one image as the network takes it, batch included: (1, C, H, W)."""
        return (1, self.channels, self.size, self.size)


class Card(_Plain):
    """Everything that a model knows about itself beside its weights; each field may be unknown (None).

    Attributes:
        recipe: What rebuilds its architecture.
        preprocessing: What its images go through.
        task: What it was trained for.
        classes: Names of its outputs, in their order.
        metrics: What it was measured to do, as JSON data.
        carried: What the header of its file says that this version does not know; saved with it again.
    """

    recipe: Recipe | None = None
    preprocessing: Preprocessing | None = None
    task: Literal["classification", "regression"] | None = None
    classes: tuple[str, ...] | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    carried: dict[str, Any] = Field(default_factory=dict, exclude=True)


def card_of(model: nn.Module) -> Card:
    """Return the card that `model` carries, or an empty one."""
    return getattr(model, ATTRIBUTE, None) or Card()


def attach(model: nn.Module, **fields: Any) -> nn.Module:
    """Update fields of the card that `model` carries, and return the model."""
    setattr(model, ATTRIBUTE, card_of(model).model_copy(update=fields))
    return model
