"""Create networks: from a name and weights, or from a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from regraft.anatomy.heads import find_heads
from regraft.anatomy.modes import in_mode, unmoved_on_failure
from regraft.anatomy.paths import is_within
from regraft.arguments import check_arguments, path_problem, shown
from regraft.card import attach, card_of
from regraft.checkpoint.any_file import read_state_dicts
from regraft.checkpoint.file.format import INDEX_SUFFIX, SUFFIX, read_header
from regraft.checkpoint.foreign.kinds import first_names
from regraft.checkpoint.matching.load_plan import UnfitError, carry_out
from regraft.checkpoint.matching.load_report import Confidence, LoadReport, confidence_of
from regraft.checkpoint.matching.loading import Rules, plan_loading
from regraft.checkpoint.packaged import PACKAGE, packaged_weights
from regraft.checkpoint.read import load, load_untrained
from regraft.errors import ArgumentError, CheckpointError, ConfigError, nearest
from regraft.surgery.head import replace_head
from regraft.wording import for_caller
from regraft.zoo import build, is_network_name, weights_name

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


@overload
def create_model(
    name: str | Path,
    *,
    weights: str | Path | Enum | None = ...,
    num_classes: int | None = ...,
    rename: Mapping[str, str] | None = ...,
    match: Literal["names", "shapes"] = ...,
    entry: str | None = ...,
    accept: Confidence = ...,
    dry_run: Literal[False] = ...,
    trust_code: bool = ...,
    **others: Any,
) -> nn.Module: ...


@overload
def create_model(name: str | Path, *, dry_run: Literal[True], **options: Any) -> LoadReport: ...


@unmoved_on_failure()
def create_model(  # pyright: ignore[reportInconsistentOverload]  # a path becomes a string first
    name: str,
    *,
    weights: str | Path | Enum | None = "default",
    num_classes: int | None = None,
    rename: Mapping[str, str] | None = None,
    match: Literal["names", "shapes"] = "names",
    entry: str | None = None,
    accept: Confidence = "certain",
    dry_run: bool = False,
    trust_code: bool = False,
    **others: Any,
) -> nn.Module | LoadReport:
    """Create a network by name or from a checkpoint, with pretrained weights and, if requested, a new head.

    Args:
        name: `"resnet18"` (torchvision), `"timm/NAME"`, `"py:path/file.py:Class"` or `"py:package.module:Class"`; or a
            checkpoint of `save`, `fit` or `regraft train` (its file or folder), which comes with its edits and its
            frozen parameters. A file or folder whose name is that of a network needs `./` before it.
        weights: `"default"` (what its library recommends, downloaded if needed; those in a checkpoint), `"none"`, the
            name of registered weights such as `"IMAGENET1K_V2"` or torchvision's `ResNet18_Weights.IMAGENET1K_V1`, or
            a file. None is `"none"`. A file must fit except for the head. With `"none"` or a file, nothing is frozen.
        num_classes: Number of outputs K of a new, freshly initialized head; None keeps the head.
        rename: As for `load_weights`, for weights in a file.
        match: As for `load_weights`.
        entry: As for `load_weights`.
        accept: As for `load_weights`.
        dry_run: Whether to return how weights in a file fit, with every pair, instead of the network.
        trust_code: Whether a class of your own (`py:…`) may be imported.
        **others: Not accepted; the error names the equivalent of an argument of torchvision, timm or Keras.

    Returns:
        The network in training mode; with `dry_run`, a report.

    Raises:
        ConfigError: An argument is unknown, or describes weights in a file and there is none.
        ArgumentError: An argument is of another type; the message says what to write.
        ModelError: The name is unknown, the class cannot be built, or weights cannot be downloaded.
        CheckpointError: The file cannot be read, or belongs to another architecture.
        TrustError: The name is `py:…`, or that of a checkpoint with such a class, and `trust_code` is false.
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
    name = str(name) if isinstance(name, Path) else name
    check_arguments(create_model, locals())
    rules = Rules(rename or {}, match, entry, confidence_of(accept), adapt=(), may_adapt=False)
    weights = weights_name(name, weights)
    path = weights_path(weights)
    if path is None and (dry_run or rules != Rules(adapt=(), may_adapt=False)):
        raise ConfigError(
            f"rename, match, entry, accept and dry_run are about weights in a file, and weights is '{weights}'. Give a "
            "file, or leave them out."
        )
    model = _without_weights(name, weights, is_from_file=path is not None, trust_code=trust_code)
    # The file goes in before the head is replaced: it must fit the network that its authors trained.
    if path is not None and dry_run:
        return replace(plan_loading(model, read_state_dicts(path), rules).report, dry_run=True)
    if path is not None:
        _load_backbone(model, path, name, rules)
    return replace_head(model, num_classes) if num_classes is not None else model


def is_checkpoint(name: str) -> bool:
    """Return whether a model is named by a checkpoint, rather than by a name that `list_models` knows or a class."""
    if name.endswith((SUFFIX, INDEX_SUFFIX)):
        return not is_network_name(name)
    return not is_network_name(name) and path_problem(name) is None and Path(name).exists()


def weights_path(weights: str | Path) -> Path | None:
    """Return the file that an argument `weights` names; None for `"default"`, `"none"` and registered weights.

    Raises:
        ModelError: It is `package:NAME`, and no such package is installed, or it has no weights.
    """
    if isinstance(weights, str) and weights.startswith(PACKAGE):
        return packaged_weights(weights)
    path = Path(weights)
    looks_like_file = isinstance(weights, Path) or path.exists() or path.suffix != "" or len(path.parts) > 1
    return path if str(weights) not in ("default", "none") and looks_like_file else None


def _without_weights(name: str, weights: str | Path, *, is_from_file: bool, trust_code: bool) -> nn.Module:
    """Build a network, with its weights unless they come from a file."""
    if not is_checkpoint(name):
        return build(name, weights="none" if is_from_file else str(weights), trust_code=trust_code)
    if is_from_file or weights == "none":
        return load_untrained(name, trust_code=trust_code)
    if weights != "default":
        raise ConfigError(
            f"'{name}' is a checkpoint with weights of its own, and has no registered weights '{weights}'. Expected "
            "default (those in it), none, or a file."
        )
    return in_mode(load(name, trust_code=trust_code), True)


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


def note_weights(model: nn.Module, path: Path) -> None:
    """Name the file that a network's weights are from in its recipe, if it has one."""
    recipe = card_of(model).recipe
    if recipe is not None:
        source = recipe.source.model_copy(update={"weights": path.name})
        attach(model, recipe=recipe.model_copy(update={"source": source}))


def _load_backbone(model: nn.Module, path: Path, name: str, rules: Rules) -> None:
    """Load a file into a freshly built model; only the head may be missing or of another width.

    Raises:
        CheckpointError: The file belongs to another architecture.
    """
    _require_no_edits(model, path, name)
    try:
        plan = plan_loading(model, read_state_dicts(path), rules)
        carry_out(plan, model, min_share=0.0)
    except UnfitError as error:
        raise CheckpointError(f"{error.problem} {error.advice}") from error
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
        if absent and {*absent} <= {match.name for match in report.proposed}:
            raise CheckpointError(
                f"'{path}' fits {name} only under other names: {report.cause}. To go on, {report.suggestion}. If "
                "that is not the network that the file was trained with, give its name."
            )
        raise CheckpointError(
            f"'{path}' holds weights of another architecture than {name}: {problem}. Give the name of the network that "
            "the file was trained with."
        )
    note_weights(model, path)


def _require_no_edits(model: nn.Module, path: Path, name: str) -> None:
    """Refuse a checkpoint of an edited network as weights of another: its new layers would be dropped.

    Raises:
        CheckpointError: It is one.
    """
    header = read_header(path) if path.name.endswith((SUFFIX, INDEX_SUFFIX)) and path.is_file() else None
    recipe = header.card.recipe if header is not None else None
    if recipe is None or recipe.steps == getattr(card_of(model).recipe, "steps", ()):
        return
    edits = [step for step in recipe.steps if step.operation != "replace_head"]
    if edits or recipe.source.parts:
        what = f"{recipe.source.name} with the edits {', '.join(map(str, edits))}" if edits else recipe.source.name
        raise CheckpointError(
            f"'{path}' is a checkpoint of another architecture than {name}: {what}. As weights of {name} it would lose "
            f"its new layers and what is frozen in it. It is a model itself: "
            f"{for_caller(python=f'create_model({str(path)!r})', command=f'--model {path}')}."
        )
