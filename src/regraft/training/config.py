"""All options of a training run with their defaults, as one value that can be saved as TOML."""

import tomllib
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from regraft.checkpoint.file.atomic import atomic_write
from regraft.data.transforms import Augmentation
from regraft.errors import ConfigError
from regraft.fields import CheckedFields, explain
from regraft.frontier.cache.precision import Precision

ComputePrecision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
HeadStart = Literal["auto", "given", "ridge"]
OnNan = Literal["stop", "skip"]

HEAD_LR = 1e-2
FINE_TUNE_LR = 5e-4
SCRATCH_LR = 2e-3
OTHER_WORDS = {  # names of these options in other libraries
    "batch_size": ("bs", "batch", "train_batch_size", "per_device_train_batch_size"),
    "epochs": ("n_epochs", "num_epochs", "max_epochs", "num_train_epochs", "nb_epoch"),
    "image_size": ("img_size", "input_size", "target_size", "resolution"),
    "loss": ("criterion", "loss_fn", "loss_func", "objective"),
    "lr": ("learning_rate", "base_lr", "max_lr", "lr0"),
    "out": ("output_dir", "save_dir", "log_dir", "checkpoint_dir", "save_path"),
    "schedule": ("scheduler", "lr_scheduler", "lr_schedule", "sched"),
    "seed": ("random_state", "random_seed", "manual_seed"),
    "validation_share": ("validation_split", "val_split", "valid_pct", "val_size", "test_size"),
    "weight_decay": ("wd", "decay", "l2"),
    "workers": ("num_workers", "n_jobs"),
}
MAX_COUNT = 10**9
MAX_WORKERS = 1_000  # each is a process
MAX_SIDE = 10**5  # pixels


class TrainConfig(CheckedFields):
    """The options of `fit` and of `regraft train`, where the same names have dashes.

    Attributes:
        data: Folder or table.
        model: Name of the network, see `create_model`.
        weights: `default`, `none`, a registered name, or a file.
        freeze: Patterns of layers to freeze, see `select`.
        freeze_until: Freeze everything up to and including this layer, in execution order.
        unfreeze_all: Train every layer.
        unfreeze: Gradual unfreezing, as in `head:3,layer4:5,all:10` (see `Schedule`), which also sets `epochs`.
            Without any of these four options, everything but the new head is frozen if the network is pretrained, and
            nothing if it is not.
        epochs: Passes over the photos.
        batch_size: Photos per step.
        optimizer: Name of a class of torch.optim.
        lr: Highest learning rate. None: for a head alone on cached features, cross-validated together with the weight
            decay (see `sweep_heads`); else 1e-2 for a head, 5e-4 for more of a pretrained network, 2e-3 from scratch.
        head_start: Initial weights of a linear head on cached features: `given` (those of the model), `ridge` (ridge
            regression in closed form), or `auto`: the better one if `lr` is cross-validated, else `given`.
        backbone_lr: Highest learning rate of everything but the head. None: that of the head, or a twentieth of it with
            `unfreeze`.
        layer_decay: Layer-wise learning-rate decay: factor from each block to the one before it, see `param_groups`.
        weight_decay: Weight decay of weight matrices and kernels; biases and norms are not decayed.
        schedule: `cosine`: linear warm-up over the first 5 % of the steps, then down to zero along a cosine;
            `constant`: no change.
        augment: Augmentation of the training photos: `none`, `flip`, `standard` or `trivial`.
        mixup: Parameter of the beta distribution of mixup (0: no mixup; 0.2: a little; 1: uniform shares). Features are
            mixed if they are cached, else images. Source: https://arxiv.org/abs/1710.09412, and for features https://arxiv.org/abs/1806.05236.
        views: Number of random views of each photo with `standard` and `trivial`; None: a new one in each epoch. Frozen
            layers are computed once for each view, so only a fixed number can be cached.
        cache: Whether the frozen part is computed once and cached, see `partition`.
        cache_precision: Precision of the cached features: `full`, `bf16`, `fp16` or `int8`, see `packed`.
        fast: Whether convolutions run in channels-last memory format, and the cached part with folded batch norms;
            equal up to rounding.
        loss: `cross-entropy`, `focal`; for regression `mse`, `l1`, `huber`; None: the first of the task; or `py:…`.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        precision: Precision of the forward pass with float32 weights; `auto` is bf16 on a GPU that supports it, else
            fp32. A head of one layer on cached features stays in float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        workers: Number of loading processes; None: one per core for photos that are decoded on access, else none.
        seed: Random seed of the split, the new head's initial weights, the order of samples and the augmentation.
        image_size: Side of the network's input in pixels; None: the size that the network was trained with.
        validation_share: Share of each class kept for validation where the data has no split.
        max_unreadable: Share of unreadable files above which the run stops.
        on_nan: Reaction to a loss that is not finite: `stop`, or `skip` the step; `skip` also skips steps whose
            gradient is not finite.
        checkpoint_minutes: Minutes between saved states of the run within an epoch, see `fit`; 0: after every step.
        keep_last: Number of saved states to keep.
        out: Folder for the results; None writes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    OTHER_WORDS: ClassVar[dict[str, str]] = {
        **{other: f"Write {name}=…" for name, others in OTHER_WORDS.items() for other in others},
        "pretrained": 'Write weights="default", or "none" for False',
        "validation_data": "Pass data as a pair: (train, validation)",
    }

    data: str | None = None
    model: str = "resnet18"
    weights: str = "default"
    freeze: tuple[str, ...] = ()
    freeze_until: str | None = None
    unfreeze_all: bool = False
    unfreeze: str | None = None
    epochs: int = Field(default=25, ge=1, le=MAX_COUNT)
    batch_size: int = Field(default=32, ge=1, le=MAX_COUNT)
    optimizer: str = "adamw"
    lr: float | None = Field(default=None, gt=0)
    head_start: HeadStart = "auto"
    backbone_lr: float | None = Field(default=None, gt=0)
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)
    schedule: Schedule = "cosine"
    augment: Augmentation = "flip"
    mixup: float = Field(default=0.0, ge=0)
    views: int | None = Field(default=None, ge=1, lt=1000)
    cache: bool = True
    cache_precision: Precision = "full"
    fast: bool = True
    loss: str | None = None
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: ComputePrecision = "auto"
    device: str = "auto"
    workers: int | None = Field(default=None, ge=0, le=MAX_WORKERS)
    seed: int = Field(default=0, ge=0, lt=2**32)
    image_size: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    validation_share: float = Field(default=0.2, gt=0, lt=1)
    max_unreadable: float = Field(default=0.1, ge=0, le=1)
    on_nan: OnNan = "stop"
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    out: str | None = None

    @field_validator("weights", mode="before")
    @classmethod
    def _names_weights(cls, weights: Any) -> Any:
        if weights is None:
            return "none"
        return str(weights) if isinstance(weights, (Enum, Path)) else weights

    @field_validator("data", "model", "weights", "loss", "out")
    @classmethod
    def _fits_a_toml_file(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError("it has bytes that are no UTF-8, which config.toml cannot hold; rename it") from error
            if "\0" in text:
                raise ValueError("it has a null byte, which no file's name can hold")
        return text

    def updated(self, **options: Any) -> "TrainConfig":
        """Return this configuration with other values, checked.

        Raises:
            ConfigError: An option is unknown or has an invalid value.
        """
        return make_config({**self.model_dump(exclude_unset=True), **options}, "the options")


def make_config(values: dict[str, Any], where: str) -> TrainConfig:
    """Check a dict of options and return the configuration; errors name `where` the options come from.

    Raises:
        ConfigError: An option is unknown (the nearest names are shown) or has an invalid value.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, TrainConfig, '`regraft train --help` lists all.')}.") from error


def read_config(path: Path) -> dict[str, Any]:
    """Read the options in a TOML file.

    Raises:
        ConfigError: The file is missing or malformed, or one of its options is unknown or invalid.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file '{path}' (looked from {Path.cwd()}). Give the path of a .toml file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not TOML: {error}.") from error
    make_config(values, f"'{path}'")
    return values


def write_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration as TOML; options without a value are left out."""
    import tomli_w

    with atomic_write(path, flush=False) as temporary:
        temporary.write_text(tomli_w.dumps(config.model_dump(exclude_none=True, mode="json")), encoding="utf-8")
