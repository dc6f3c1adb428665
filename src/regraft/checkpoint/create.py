"""Create networks: from a name and weights, or from the recipe of a checkpoint."""

import contextlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from regraft.anatomy.heads import find_heads
from regraft.anatomy.modes import preserved_randomness, unmoved_on_failure
from regraft.anatomy.paths import is_within
from regraft.arguments import check_arguments, shown
from regraft.card import Recipe, Source, attach, card_of
from regraft.checkpoint.any_file import read_state_dicts
from regraft.checkpoint.foreign.kinds import first_names
from regraft.checkpoint.matching.load_plan import UnfitError, carry_out
from regraft.checkpoint.matching.loading import Rules, plan_loading
from regraft.errors import ArgumentError, CheckpointError, ConfigError, EditError, ModelError, RegraftError, nearest
from regraft.surgery.grafting import rebuild_grafted
from regraft.surgery.head import replace_head
from regraft.surgery.layer_text.build import construct
from regraft.surgery.layer_text.parse import shortened
from regraft.surgery.recipe import apply_step
from regraft.surgery.stitching import rebuild_stitched
from regraft.zoo import PYTHON, build, weights_name

MAX_STEPS = 64  # in a recipe; each costs a shape-only run
MAX_PARTS = 32
OTHER_WORDS = {  # arguments of torchvision, timm, Keras and transformers → what to write instead
    "pretrained_cfg": 'Write weights="default", or the name of registered weights.',
    "checkpoint_path": "Write weights=PATH.",
    "in_chans": "Change the finished network: regraft.replace_stem(model, channels).",
    "include_top": "Change the finished network: regraft.truncate(model, drop=1).",
    "features_only": "Change the finished network: regraft.truncate(model, after=LAYER).",
    "drop_rate": "Build the network with timm, and pass the module on.",
    "progress": "Downloads show theirs on standard error.",
    "device": "Move the finished network: model.to(device).",
    "trust_remote_code": "Write trust_code=True.",
    **dict.fromkeys(
        ("in_channels", "input_channels", "channels"),
        "Change the finished network: regraft.replace_stem(model, channels).",
    ),
    **dict.fromkeys(("classes", "n_classes", "num_labels", "nb_classes", "out_features"), "Write num_classes=K."),
}
# The functions with which constructors initialize parameters: methods of tensors, and torch.nn.init. All of them return
# the tensor that they fill, which is what lets `_SkipInitialization` answer in their place.
# fmt: off
FILLS = frozenset((
    "normal_", "uniform_", "fill_", "zero_", "copy_", "erfinv_", "mul_", "div_", "add_", "sub_", "clamp_", "constant_",
    "ones_", "zeros_", "eye_", "dirac_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
    "kaiming_normal_", "orthogonal_", "sparse_",
))
# fmt: on


@unmoved_on_failure()
def create_model(
    name: str,
    *,
    weights: str | Path | Enum | None = "default",
    num_classes: int | None = None,
    trust_code: bool = False,
    **others: Any,
) -> nn.Module:
    """Create a network by name, with pretrained weights and, if requested, a new head.

    Args:
        name: `"resnet18"` (torchvision), `"timm/NAME"`, `"py:path/file.py:Class"` or `"py:package.module:Class"`.
        weights: `"default"` (what its library recommends, downloaded if needed), `"none"`, the name of registered
            weights such as `"IMAGENET1K_V2"` or torchvision's `ResNet18_Weights.IMAGENET1K_V1`, or a file. None is
            `"none"`. A file must fit except for the head.
        num_classes: Number of outputs K of a new, freshly initialized head; None keeps the head.
        trust_code: Whether a class of your own (`py:…`) may be imported.
        **others: Not accepted; the error names the equivalent of an argument of torchvision, timm or Keras.

    Raises:
        ConfigError: An argument is unknown.
        ArgumentError: An argument is of another type; the message says what to write.
        ModelError: The name is unknown, the class cannot be built, or weights cannot be downloaded.
        CheckpointError: The file cannot be read, or belongs to another architecture.
        TrustError: The name is `py:…` and `trust_code` is false.
    """
    _refuse_other_words(others)
    if isinstance(name, nn.Module):
        raise ArgumentError(
            f"create_model: name is {shown(name)}, which is a network already. Use it as it is; "
            "regraft.replace_head(model, num_classes) gives it another head."
        )
    if isinstance(weights, bool):
        raise ArgumentError(
            f'create_model: weights is {weights}, expected a name. Write weights="{"default" if weights else "none"}".'
        )
    check_arguments(create_model, locals())
    weights = weights_name(name, weights)
    path = Path(weights)
    looks_like_file = isinstance(weights, Path) or path.exists() or path.suffix != "" or len(path.parts) > 1
    from_file = str(weights) not in ("default", "none") and looks_like_file
    model = build(name, weights="none" if from_file else str(weights), trust_code=trust_code)
    # The file goes in before the head is replaced: it must fit the network that its authors trained.
    if from_file:
        _load_backbone(model, path, name)
    return replace_head(model, num_classes) if num_classes is not None else model


def _refuse_other_words(others: Mapping[str, Any]) -> None:
    """Refuse arguments that other libraries have, and name their equivalent here.

    Raises:
        ConfigError: There is such an argument.
    """
    for word, value in others.items():
        advice = nearest(word, ("weights", "num_classes", "trust_code")) or "It takes weights, num_classes, trust_code."
        if word == "pretrained":
            advice = f'Write weights="{"default" if value else "none"}".'
        raise ConfigError(f"create_model has no argument '{word}'. {OTHER_WORDS.get(word, advice)}")


def rebuild(recipe: Recipe, *, trust_code: bool = False, unset: bool = False) -> nn.Module:
    """Build the architecture that a recipe describes, with fresh weights; the random state is preserved.

    Args:
        recipe: A source and edits.
        trust_code: Whether the user's own code may be imported.
        unset: Whether parameters may stay uninitialized, because the caller overwrites all of them or reads none. This
            saves most of the time. Buffers are always initialized, as some of them are in no file.

    Raises:
        ModelError: The source is unknown here.
        TrustError: The source is the user's own code and `trust_code` is false.
        EditError: A step does not fit.
    """
    # With trusted code, the recipe may run anything, so limits on it would have no effect.
    if not trust_code:
        _require_bounded(recipe)
    # Initialization is skipped only if nothing reads the values: layers given as text, stitched parts and a user's own
    # constructors may compute with their weights, and so do edits such as `replace_stem`.
    is_plain = not recipe.source.layers and not recipe.source.parts and not recipe.source.name.startswith(PYTHON)
    is_blind = is_plain and all(step.operation == "replace_head" for step in recipe.steps)
    with preserved_randomness():
        # The steps lie outside of the interception: a new head is initialized as always, which costs little.
        with _SkipInitialization() if unset and is_blind else contextlib.nullcontext():
            model = _from_source(recipe.source, trust_code)
        for step in recipe.steps:
            model = apply_step(model, step, trust_code=trust_code)
    return attach(model, recipe=recipe)


def _from_source(source: Source, trust_code: bool) -> nn.Module:
    """Build the network that a recipe starts from.

    Raises:
        ModelError: The source is unknown, or its parts cannot be joined.
    """
    if source.layers:
        return construct(source.layers, trust_code=trust_code)
    if not source.parts:
        return build(source.name, trust_code=trust_code)
    join = {"stitch": rebuild_stitched, "graft": rebuild_grafted}.get(source.name)
    if join is None:
        raise ModelError(f"a recipe puts networks together by '{source.name}', expected stitch or graft.")
    parts = tuple(rebuild(part, trust_code=trust_code) for part in source.parts)
    try:
        return join(parts, source.arguments, trust_code=trust_code)
    except RegraftError:
        raise
    except Exception as error:  # a recipe comes from a file, so its arguments may be of any type
        raise ModelError(
            f"a recipe cannot put its {len(parts)} networks together by {source.name}: {type(error).__name__}: "
            f"{str(error)[:200]}. Get or make the file again."
        ) from error


def _require_bounded(recipe: Recipe) -> None:
    """Refuse a recipe whose cost has no reasonable limit.

    Raises:
        EditError: It has too many steps or parts, or selects layers by a regular expression, whose time is unbounded.
    """
    # An explicit list instead of recursion: recipes nest as deep as the file says.
    recipes, steps, waiting = 0, 0, [recipe]
    while waiting:
        current = waiting.pop()
        recipes, steps = recipes + 1, steps + len(current.steps)
        waiting += current.source.parts
        slow = next((step for step in current.steps if str(step.arguments.get("path")).startswith("re:")), None)
        if slow is not None:
            raise EditError(
                f"a recipe names layers by a regular expression ('{shortened(str(slow))}'), which it may not. "
                "Name them one by one."
            )
        if recipes > MAX_PARTS or steps > MAX_STEPS:
            raise EditError(
                f"a recipe has more than {MAX_STEPS} steps or {MAX_PARTS} parts, which are not carried out. "
                "Keep the weights alone, and use load_weights with a model of your own."
            )


class _SkipInitialization(TorchFunctionMode):
    """Skips the initialization of parameters while a network of torchvision or timm is built.

    Initialization takes most of the time of building, and the system does not provide memory until it is written to.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, or return its target unchanged if it would initialize a parameter."""
        kwargs = kwargs or {}
        # Methods have their tensor first; torch.nn.init passes itself on by keyword, with the name "tensor".
        target = args[0] if args else kwargs.get("tensor")
        # Parameters only: buffers and temporary tensors, such as timm's drop-path rates, keep their values.
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in FILLS:
            return target
        return func(*args, **kwargs)


def note_weights(model: nn.Module, path: Path) -> None:
    """Name the file that a network's weights are from in its recipe, if it has one."""
    recipe = card_of(model).recipe
    if recipe is not None:
        source = recipe.source.model_copy(update={"weights": path.name})
        attach(model, recipe=recipe.model_copy(update={"source": source}))


def _load_backbone(model: nn.Module, path: Path, name: str) -> None:
    """Load a file into a freshly built model; only the head may be missing or of another width."""
    try:
        plan = plan_loading(model, read_state_dicts(path), Rules(adapt=(), may_adapt=False))
        carry_out(plan, model, min_share=0.0)
    except UnfitError as error:
        raise CheckpointError(
            f"{error.problem} Look with `regraft convert {path.name} OUT.safetensors --model {name} --dry-run`, which "
            "has options to choose and to rename, and give its result."
        ) from error
    report = plan.report
    heads = find_heads(model)
    absent = [*report.missing, *(name for name, _, _ in report.mismatched)]
    absent = [key for key in absent if not any(is_within(key, head) for head in heads)]
    # A file may hold more than the network, as a projector of self-supervised training. Only unknown tensors inside of
    # its own children show another architecture.
    children = {child for child, _ in model.named_children()}
    surplus = [key for key in report.unexpected if key.partition(".")[0] in children]
    if absent or surplus:
        problem = (
            f"it lacks {first_names(absent)}" if absent else f"it has {first_names(surplus)}, which the model lacks"
        )
        raise CheckpointError(
            f"'{path}' holds weights of another architecture than {name}: {problem}. "
            "Give the name of the network that the file was trained with."
        )
    note_weights(model, path)
