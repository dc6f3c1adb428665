"""Features that were computed once for all epochs, and the two parts of the network around them."""

from collections.abc import Sequence
from dataclasses import dataclass

from regraft.frontier.cache.key import checksum
from regraft.frontier.partitioning import Partition
from regraft.training.features.batches import Features
from regraft.training.features.extract import Extractor
from regraft.training.result import ComputedOnce


@dataclass(frozen=True)
class Frontier:
    """The features of the constant part, and the parts of the network.

    Attributes:
        parts: The two parts of the network.
        train: Training features.
        validation: Validation features.
        sum: `checksum` of the constant part when the features were computed.
    """

    parts: Partition
    train: Features
    validation: Features
    sum: int

    @classmethod
    def of(cls, extractor: Extractor, features: Sequence[Features]) -> "Frontier":
        """Make it from an extractor and its features of training and validation photos."""
        train, validation = features
        return cls(extractor.parts, train, validation, checksum(extractor.parts.prefix))

    @property
    def seconds(self) -> float:
        """Time to compute or load the features of training and validation photos."""
        return self.train.seconds + self.validation.seconds

    def is_valid(self) -> bool:
        """Return whether the constant part is unchanged since the features were computed."""
        return checksum(self.parts.prefix) == self.sum

    def summary(self, epochs: int) -> ComputedOnce:
        """Return a summary of the computed features, and of the time that they saved over so many epochs."""
        parts, both = self.parts, (self.train, self.validation)
        constant, live = parts.multiply_adds
        an_epoch_s = sum(part.cost_s / part.views for part in both)
        return ComputedOnce(
            frontier=tuple((cut.place, cut.shape) for cut in parts.frontier),
            share=constant / max(constant + live, 1),
            views=self.train.views,
            bytes=sum(part.bytes for part in both),
            where=self.train.where,
            was_found=all(part.was_found for part in both),
            seconds=self.seconds,
            train_cost_s=self.train.cost_s,
            saved_s=max(0.0, epochs * an_epoch_s - self.seconds),
            note=parts.note,
        )

    def lines(self) -> list[str]:
        """Describe the computed features as lines of text."""
        how = "found in the cache" if self.train.was_found and self.validation.was_found else "computed once"
        views = f", {self.train.views} versions of each photo" if self.train.views > 1 else ""
        kept = f"kept {self.train.where}"
        if self.train.precision != "full":
            error = max(self.train.error, self.validation.error)
            kept += f" as {self.train.precision} (wrong by {error:.2%} of the largest value at most)"
        return [f"frontier   {self.parts}", f"           {how} in {self.seconds:.1f} s{views}, {kept}"]
