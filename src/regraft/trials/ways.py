"""The ways of training that are compared, as options of `regraft train`.

A way is the options of one run, or of several that go on from the weights of the one before. All get the same photos
and the same number of passes over them. Training from scratch gets more (`SCRATCH_FACTOR`), stronger augmentation and a
learning rate of its own, because random weights need them: it is the reference, and a weak one would flatter the rest.
The recipes are fixed: none looks at the photos on which it is measured.
"""

import itertools
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import ConfigError, nearest
from regraft.torch_internals import NormBase
from regraft.train_options import list_options
from regraft.training.config import TrainConfig, make_config
from regraft.wording import option

SCRATCH, PROBE, ADVISED, LP_FT, GRADUAL, ALL = "scratch", "probe", "advised", "lp-ft", "gradual", "all"
SCRATCH_FACTOR = 4  # passes of training from scratch for one of the others
MIN_STEPS = 50  # a few images give a step or two per pass, with which nothing is learned in 25
CURVE_POINTS = 12  # validated epochs of a run
MIN_EPOCHS = 3  # one for each stage of gradual unfreezing
OF_WEIGHTS = ("rename", "match", "entry", "accept")  # options about a file of weights
LP_FT_LR = 1e-4  # a fifth of the rate for all layers; the head is right already

Options = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        name: As an option names it.
        title: As pages name it.
        text: What it does, in a sentence.
        is_pretrained: Whether it starts from pretrained weights.
        stages_of: Returns the options of each of its runs, from the layers of a network and a number of passes.
    """

    name: str
    title: str
    text: str
    is_pretrained: bool
    stages_of: Callable[["LayerSplit", int], tuple[Options, ...]]


@dataclass(frozen=True)
class LayerSplit:
    """What the ways need to know of a network.

    Attributes:
        middle: Path of the last layer in the lower half of its blocks, in the order of execution; None for one block.
        norms: Patterns of its batch norms, which stay frozen. With a few photos, their running statistics are those of
            no distribution: on 40 photos, all layers of a pretrained MobileNetV1 reach 0.58 with them and 0.72 without.
    """

    middle: str | None
    norms: tuple[str, ...]

    @classmethod
    def of(cls, facts: ModelFacts) -> "LayerSplit":
        """Read them off a network."""
        heads = facts.head_parameters
        depths = {name: depth for name, depth in facts.depths.items() if name not in heads}
        middle = max(depths.values(), default=0) // 2
        owners = [name.split(".")[:-1] for name, depth in depths.items() if depth == middle]
        alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*owners, strict=False))
        path = ".".join(names[0] for names in alike) or ".".join(owners[-1] if owners else [])
        norms = {
            path: f"type:{type(layer).__name__}"
            for path, layer in facts.model.named_modules()
            if isinstance(layer, NormBase) and layer.track_running_stats
        }
        is_outside = not any(name.rpartition(".")[0] in norms for name in heads)
        has_halves = max(depths.values(), default=0) > 0
        return cls(path if has_halves and path else None, tuple(sorted(set(norms.values()))) if is_outside else ())

    def all_but_norms(self, **options: Any) -> Options:
        """Return the options that train every layer but the batch norms, with more options."""
        return {"unfreeze_all": True, **({"freeze": self.norms} if self.norms else {}), **options}


def _scratch(_: LayerSplit, epochs: int) -> tuple[Options, ...]:
    return ({"weights": "none", "augment": "standard", "epochs": SCRATCH_FACTOR * epochs},)


def _probe(_: LayerSplit, epochs: int) -> tuple[Options, ...]:
    return ({"epochs": epochs},)


def _advised(_: LayerSplit, epochs: int) -> tuple[Options, ...]:
    return ({ADVISED: True, "epochs": epochs},)  # the rest follows from the photos, see `trials/advised.py`


def _lp_ft(layers: LayerSplit, epochs: int) -> tuple[Options, ...]:
    return {"epochs": epochs // 2}, layers.all_but_norms(lr=LP_FT_LR, epochs=epochs - epochs // 2)


def _gradual(layers: LayerSplit, epochs: int) -> tuple[Options, ...]:
    first, second = max(1, epochs // 4), max(1, epochs // 3) if layers.middle else 0
    upper = (layers.all_but_norms(freeze_until=layers.middle, epochs=second),) if second else ()
    return {"epochs": first}, *upper, layers.all_but_norms(epochs=epochs - first - second)


def _all_layers(layers: LayerSplit, epochs: int) -> tuple[Options, ...]:
    return (layers.all_but_norms(epochs=epochs),)


WAYS = (
    Way(
        SCRATCH,
        "from scratch",
        f"Random weights, all layers, random parts of the photos, {SCRATCH_FACTOR} times as many passes over them.",
        False,
        _scratch,
    ),
    Way(PROBE, "linear probe", "Pretrained weights, of which only a new head is trained.", True, _probe),
    Way(
        ADVISED,
        "advised freezing",
        "Pretrained weights, frozen as `regraft advise` says of the photos of each run; batch norms stay frozen.",
        True,
        _advised,
    ),
    Way(
        LP_FT,
        "LP-FT",
        "A linear probe for half of the passes, then all layers but batch norms with a small rate (arXiv 2202.10054).",
        True,
        _lp_ft,
    ),
    Way(
        GRADUAL,
        "gradual unfreezing",
        "A head for a quarter of the passes, then the upper half of the layers as well, then all but batch norms.",
        True,
        _gradual,
    ),
    Way(ALL, "all layers", "Pretrained weights, all layers but batch norms from the start.", True, _all_layers),
)
NAMES = tuple(way.name for way in WAYS)


def ways_named(names: Sequence[str]) -> tuple[Way, ...]:
    """Return ways by name, each once, in their usual order.

    Raises:
        ConfigError: There is no way of that name, or none is named.
    """
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"no way of training '{name}'. {nearest(name, NAMES)} Known: {', '.join(NAMES)}.")
    if not names:
        raise ConfigError(f"{option('ways')} is empty, expected some of {', '.join(NAMES)}.")
    return tuple(way for way in WAYS if way.name in names)


def epochs_for(count: int, config: TrainConfig) -> int:
    """Return the passes over so many photos: `config.epochs`, or as many as give `MIN_STEPS` steps.

    >>> epochs_for(10, TrainConfig()), epochs_for(245, TrainConfig())
    (50, 25)
    """
    return max(config.epochs, math.ceil(MIN_STEPS / math.ceil(count / config.batch_size)))


def stage_config(config: TrainConfig, stage: Options, seed: int) -> TrainConfig:
    """Return the options of one run of a way: those that all share, then its own; kept is the last epoch.

    Some epochs are validated, for the curves; that changes no weight.
    """
    values = {**_shared(config, stage), **stage, "seed": seed, "keep_epoch": "last"}
    return make_config({**values, "validate_every": math.ceil(stage["epochs"] / CURVE_POINTS)})


def commands(stages: Sequence[Options], config: TrainConfig, model: str, data: str, name: str) -> tuple[str, ...]:
    """Return the commands that do the same on all images with seed 0, one for each run.

    Args:
        stages: Options of the runs of a way.
        config: The options that all ways share.
        model: Name of the network.
        data: Path of the photos.
        name: Name of the way, for the folders of its runs.
    """
    lines = []
    trust = ["--trust-code"] if model.startswith("py:") else []
    for number, stage in enumerate(stages):
        out = f"runs/{name}" if len(stages) == 1 else f"runs/{name}-{number + 1}"
        options = {**_shared(config, stage), **stage, "keep_epoch": "last", "out": out}
        options.pop("seed", None)
        if number:  # it goes on from what the one before has written
            options = {key: value for key, value in options.items() if key not in ("weights", *OF_WEIGHTS)}
        start = f"runs/{name}-{number}" if number else model
        flags = [flag for key, value in options.items() for flag in _flags(key, value)]
        lines.append(shlex.join(["regraft", "train", data, "--model", start, *flags, *trust]))
    return tuple(lines)


def _shared(config: TrainConfig, stage: Options) -> Options:
    """Return the options that all ways share, without those about a file of weights where none is read."""
    values = config.model_dump(exclude_unset=True)
    unused = OF_WEIGHTS if stage.get("weights") == "none" else ()
    return {name: value for name, value in values.items() if name not in unused}


def _flags(name: str, value: Any) -> list[str]:
    flag = next(entry.flags for entry in list_options() if entry.name == name)
    if isinstance(value, (tuple, list)):
        return [text for entry in value for text in (flag, str(entry))]
    if isinstance(value, bool):
        yes, _, no = flag.partition("/")
        return [yes] if value else [no] if no else []
    return [] if value is None else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
