"""What to do next after a run or an evaluation: each suggestion only where the figures call for it.

Every command can be pasted as it stands. One that trains repeats the run from its own `config.toml` with other options,
into another folder.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from regraft.data.sources import Source
from regraft.training.metrics import Metrics, Scores
from regraft.training.result import FitResult

MIN_CONFUSED = 3  # photos, and this share of the class: fewer may be chance
MIN_CONFUSED_SHARE = 0.1
MAX_CONFUSED_PAIRS = 2
MAX_SHOWN_FILES = 3
FEW_TRAINING_PHOTOS = 20
MAX_NAMED_CLASSES = 5
MIN_GAP = 0.2  # of cross-entropy, between validation and training
MIN_GAP_RATIO = 2.0
MIN_RISE = 0.01  # of the loss, over the last third of the epochs
MIN_EPOCHS = 3
GOOD_ACCURACY = 0.99
GOOD_R2 = 0.95


@dataclass(frozen=True)
class Suggestion:
    """A finding with its figures, what to do about it, and a command that does it; None where a person has to."""

    finding: str
    action: str
    command: str | None = None


def suggest_after_run(result: FitResult, scores: Scores) -> list[Suggestion]:
    """Return what to try after a run, the most useful first."""
    if result.stopped_by is not None:
        epochs = f"{result.history[-1].epoch} of {result.config.epochs} epochs"
        finding = f"The run was stopped by {result.stopped_by} after {epochs}."
        action = "Go on from there:" if result.to_continue else "There is no state to go on from."
        return [
            Suggestion(finding, action, result.to_continue),
            *_confused(result.validation, scores, str(result.checkpoint or "")),
        ]
    return [
        *_few_photos(result),
        *_fine_tuning(result),
        *_gap(result),
        *_rising(result),
        *_confused(result.validation, scores, str(result.checkpoint or "")),
    ]


def suggest_after_evaluation(metrics: Metrics, scores: Scores) -> list[Suggestion]:
    """Return what to look at after an evaluation."""
    missing = [entry.name for entry in metrics.per_class if entry.count == 0]
    suggestions = list(_confused(metrics, scores, scores.checkpoint or ""))
    if missing:
        finding = f"{_listed(missing)} {'has' if len(missing) == 1 else 'have'} no photos here."
        suggestions.append(Suggestion(finding, "How well the model knows them remains unknown: add some."))
    return suggestions


def _few_photos(result: FitResult) -> Iterator[Suggestion]:
    few = [(name, train) for name, train, _ in result.plan.counts if train < FEW_TRAINING_PHOTOS]
    if not few:
        return
    counts = _listed([f"{name} ({train})" for name, train in sorted(few, key=lambda entry: entry[1])])
    yield Suggestion(
        f"Few photos to learn from, under {FEW_TRAINING_PHOTOS}: {counts}.",
        "Add photos to these classes, and train again:",
        _again(result, "more"),
    )


def _fine_tuning(result: FitResult) -> Iterator[Suggestion]:
    config, metrics = result.config, result.validation
    is_good = (metrics.accuracy or 0.0) >= GOOD_ACCURACY or (metrics.r2 or 0.0) >= GOOD_R2
    chooses_layers = config.unfreeze or config.unfreeze_all or config.freeze or config.freeze_until
    is_pretrained = result.plan.weights not in ("none", "as given")
    if is_good or chooses_layers or not is_pretrained or result.plan.trainable == result.plan.parameters:
        return
    yield Suggestion(
        f"{result.plan.trainable:,} of {result.plan.parameters:,} parameters were trained; the others are pretrained.",
        "Fine-tune them too, after the head. Each epoch takes longer, as it runs all that it trains:",
        _again(result, "fine-tuned", unfreeze=f"head:3,all:{max(5, config.epochs // 2)}"),
    )


def _gap(result: FitResult) -> Iterator[Suggestion]:
    config = result.config
    record = next(record for record in result.history if record.epoch == result.best_epoch)
    is_comparable = config.loss in (None, "cross-entropy") and not config.label_smoothing and not config.mixup
    if result.plan.task == "regression" or not is_comparable:
        return
    training, validation = record.train_loss, record.validation.loss
    if validation - training < MIN_GAP or validation < MIN_GAP_RATIO * training:
        return
    finding = f"Training loss {training:.3f}, validation loss {validation:.3f}: it fits its own photos much better."
    if config.augment in ("none", "flip"):
        views: dict[str, float] = {"views": 8} if result.computed_once is not None else {}
        action, command = "vary those that there are:", _again(result, "varied", augment="standard", **views)
    else:
        action, command = "mix those that there are:", _again(result, "mixed", mixup=0.2)
    yield Suggestion(finding, f"More photos help most. Without them, {action}", command)


def _rising(result: FitResult) -> Iterator[Suggestion]:
    losses = [record.validation.loss for record in result.history]
    if len(losses) < MIN_EPOCHS or result.best_epoch != result.history[-1].epoch:
        return
    before = min(losses[: max(1, len(losses) * 2 // 3)])
    if losses[-1] > (1 - MIN_RISE) * before:
        return
    finding = f"The last epoch was the best, and the validation loss still fell ({before:.3f} to {losses[-1]:.3f})."
    options: dict[str, str | float] = {"epochs": 2 * result.best_epoch}
    if result.config.unfreeze is not None:  # it sets the epochs
        options = {"unfreeze": re.sub(r"\d+$", lambda last: str(2 * int(last[0])), result.config.unfreeze.strip())}
    yield Suggestion(finding, "Train longer:", _again(result, "longer", **options))


def _confused(metrics: Metrics, scores: Scores, checkpoint: str) -> Iterator[Suggestion]:
    if metrics.task == "regression":
        return
    names = [entry.name for entry in metrics.per_class]
    counts = {entry.name: entry.count for entry in metrics.per_class}
    predicted = scores.outputs.argmax(1).tolist()
    notable = [
        pair for pair in metrics.confusions() if pair[2] >= max(MIN_CONFUSED, MIN_CONFUSED_SHARE * counts[pair[0]])
    ]
    for true, other, count in notable[:MAX_CONFUSED_PAIRS]:
        finding = f"“{true}” was taken for “{other}” {count} times of {counts[true]}."
        action = "Check these labels. If they are right, add photos that show the difference, or join the two classes"
        files = [
            path
            for path, target, guess in zip(scores.paths, scores.targets.tolist(), predicted, strict=False)
            if (names[target], names[guess]) == (true, other)
        ]
        if not files or not checkpoint:
            yield Suggestion(finding, f"{action}.")
            continue
        yield Suggestion(finding, f"{action}. How close it was:", _predict_command(checkpoint, files[:MAX_SHOWN_FILES]))


def _predict_command(checkpoint: str, files: Sequence[Source]) -> str:
    return shlex.join(["regraft", "predict", checkpoint, *map(str, files), "--top", "2"])


def _again(result: FitResult, name: str, **options: str | float) -> str:
    """Return the command, or the call, that repeats a run with other options, into a folder `…-NAME`."""
    if result.out is None or not result.is_named:
        return f"regraft.fit(model, data, {', '.join(f'{option}={value!r}' for option, value in options.items())})"
    flags = [text for option, value in options.items() for text in (f"--{option}", str(value))]
    # Without leave to import code (`--trust-code`), which no file keeps: where it is needed, the error says so.
    config, out = str(result.out / "config.toml"), f"{result.out}-{name}"
    return shlex.join(["regraft", "train", "--config", config, *flags, "--out", out])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED_CLASSES])
    return f"{shown} and {len(names) - MAX_NAMED_CLASSES} more" if len(names) > MAX_NAMED_CLASSES else shown
