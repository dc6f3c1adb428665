"""The advice, as values that a program can use and a person can read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from regraft.anatomy.summary_table import aligned
from regraft.arguments import check_arguments
from regraft.data.samples import Task
from regraft.display import block
from regraft.freezing.flags import freeze, unfreeze
from regraft.freezing.patterns import select

Certainty = Literal["clear", "likely", "open"]
HEAD_ONLY, EVERYTHING = "head only", "everything"
HEADER = ("train", "accuracy", "RGN", "LogME", "trained", "epoch", "memory", "file")
RIGHT = (False, True, True, True, True, True, True, True)
RANKING_RIGHT = (False, True, True, True, False)
LABEL = 11  # columns of the label that begins a line


@dataclass(frozen=True)
class DepthAdvice:
    """One depth from which the network can be trained, with what was measured there.

    Attributes:
        name: `everything`, `head only`, or `after LAYER`.
        layer: The last frozen layer; None for everything.
        score: Share of photos that a linear probe on what the frozen part gives gets right, or its R² for numbers, on
            photos left out; for everything, which has no frozen part, on the pixels. None where not measured.
        error: Standard error of the score.
        logme: LogME of the same features a photo; beside, not leading.
        relative_gradient: Relative gradient norm of what this depth trains and the next one does not; None where no
            step could be run.
        trainable: Number of trainable parameters.
        epoch_s: Seconds of an epoch from here on, as measured on a few photos; None where not measured.
        memory_bytes: Estimated bytes of a training step: weights, gradients, moments, activations of a batch.
        checkpoint_bytes: Bytes of the tensors that a training changes, which is what a checkpoint beside its base has.
    """

    name: str
    layer: str | None
    score: float | None
    error: float | None
    logme: float | None
    relative_gradient: float | None
    trainable: int
    epoch_s: float | None
    memory_bytes: int | None
    checkpoint_bytes: int

    def cells(self) -> tuple[str, ...]:
        """Return the depth as one row of a table to read."""
        score = "-" if self.score is None else f"{self.score:.3f} ±{self.error or 0:.3f}"
        return (
            self.name,
            score,
            "-" if self.relative_gradient is None else f"{self.relative_gradient:.2g}",
            "-" if self.logme is None else f"{self.logme:.2f}",
            _count(self.trainable),
            "-" if self.epoch_s is None else _seconds(self.epoch_s),
            "-" if self.memory_bytes is None else _bytes(self.memory_bytes),
            _bytes(self.checkpoint_bytes),
        )


@dataclass(frozen=True, repr=False)
class Advice:
    """Which layers of one network to freeze for some data, and why.

    `str()` gives the sentence and the table.

    Attributes:
        model: Name of the network, or of its class.
        data: The data as it was named; empty for datasets.
        task: Classification or regression.
        photos: Number of photos that the probes used.
        classes: Number of classes; 1 for regression.
        chance: Score of a guess that has seen the classes alone; None where nothing was probed.
        depths: The depths, from everything to the head alone.
        recommended: The one to train from; None where nothing could be determined.
        certainty: `clear`, `likely` or `open`.
        reason: Why this one, as a clause.
        would_change: What would change the answer, as sentences.
        undetermined: What could not be determined, and why, as sentences.
        options: Options of `fit` that follow the advice.
        flags: The same as flags of `regraft train`.
        seconds: Time of the whole advice.
        pass_s: Time of the forward passes in it.
    """

    model: str
    data: str
    task: Task
    photos: int
    classes: int
    chance: float | None
    depths: tuple[DepthAdvice, ...]
    recommended: DepthAdvice | None
    certainty: Certainty
    reason: str
    would_change: tuple[str, ...]
    undetermined: tuple[str, ...]
    options: dict[str, Any]
    flags: str
    seconds: float
    pass_s: float

    @property
    def head_score(self) -> float | None:
        """Cross-validated score of a head on the whole frozen network: by it, networks are ranked."""
        return self.depths[-1].score if self.depths else None

    @property
    def sentence(self) -> str:
        """The recommendation in one sentence."""
        if self.recommended is None:
            return f"No depth can be recommended for {self.model}: {self.reason}."
        what = {HEAD_ONLY: "the head only", EVERYTHING: "everything"}.get(
            self.recommended.name, f"what comes {self.recommended.name}"
        )
        return f"Train {what} of {self.model} ({self.flags}): {self.reason}; this is {self.certainty}."

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze a network in place as the advice says, and return it.

        Raises:
            SelectionError: It is another network than that of the advice, without the layer. Nothing was changed.
        """
        check_arguments(Advice.apply, locals())
        if self.recommended is not None:
            layer = self.recommended.layer
            if layer is not None:
                select(model, layer)
            unfreeze(model)
            if layer is not None:
                freeze(model, until=layer)
        return model

    def table(self) -> list[tuple[str, ...]]:
        """Return the depths as a table to read, its head first; a star is before the recommended one."""
        head = HEADER if self.task == "classification" else (HEADER[0], "R²", *HEADER[2:])
        marks = ("* " if depth is self.recommended else "  " for depth in self.depths)
        return [head, *((mark + name, *rest) for mark, (name, *rest) in zip(marks, self._cells(), strict=True))]

    def conclusions(self) -> list[str]:
        """Return the recommendation, what would change it, and what is not known, as labelled lines."""
        return [
            f"advice     {self.sentence}",
            *_labelled("changes", self.would_change),
            *_labelled("unknown", self.undetermined),
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        return [depth.cells() for depth in self.depths]

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as JSON data."""
        return {**asdict(self), "sentence": self.sentence}

    def __str__(self) -> str:
        return "\n".join([*aligned(self.table(), RIGHT), "", *self.conclusions()])

    def __repr__(self) -> str:
        return block(
            f"Advice: {self.sentence}",
            [(depth.name, f"{depth.cells()[1]} probe, {depth.trainable:,} parameters") for depth in self.depths],
        )


@dataclass(frozen=True, repr=False)
class Ranking:
    """Several networks for the same data, the best first.

    Attributes:
        advices: One for each network, ranked by the score of a head on its features, on the same photos and folds.
        reason: Why the first is first.
        undetermined: What could not be determined, as sentences.
    """

    advices: tuple[Advice, ...]
    reason: str
    undetermined: tuple[str, ...] = ()

    @property
    def best(self) -> Advice:
        """The advice for the first network."""
        return self.advices[0]

    @property
    def sentence(self) -> str:
        """The recommendation in one sentence."""
        return f"Take {self.best.model}: {self.reason}. {self.best.sentence}"

    def table(self) -> list[tuple[str, ...]]:
        """Return the networks as a table to read, its head first."""
        rows: list[tuple[str, ...]] = [("network", "head alone", "parameters", "pass", "advice")]
        for advice in self.advices:
            score = advice.depths[-1].cells()[1] if advice.depths else "-"
            total = _count(max((depth.trainable for depth in advice.depths), default=0))
            rows.append((advice.model, score, total, _seconds(advice.pass_s), advice.flags or "-"))
        return rows

    def conclusions(self) -> list[str]:
        """Return the recommendation, and what is not known, as labelled lines."""
        return [
            f"advice     Take {self.best.model}: {self.reason}.",
            *_labelled("unknown", self.undetermined),
            *(f"{'':<11}{line[11:]}" if line.startswith("advice") else line for line in self.best.conclusions()),
        ]

    @property
    def flags(self) -> str:
        """Flags of `regraft train` for the first network."""
        return self.best.flags

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as JSON data."""
        return {"sentence": self.sentence, "advices": [advice.to_dict() for advice in self.advices]}

    def __str__(self) -> str:
        networks = aligned(self.table(), RANKING_RIGHT)
        return "\n".join([*networks, "", *aligned(self.best.table(), RIGHT), "", *self.conclusions()])

    def __repr__(self) -> str:
        return block(f"Ranking: {self.sentence}", [(advice.model, advice.sentence) for advice in self.advices])


def _labelled(label: str, sentences: Sequence[str]) -> list[str]:
    return [f"{label if not number else '':<{LABEL}}{sentence}" for number, sentence in enumerate(sentences)]


def _count(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1e3:.0f} K" if number < 1e6 else f"{number / 1e6:.1f} M"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _bytes(count: int) -> str:
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
