"""What follows from the structure of a network, worked out once and handed on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from regraft.anatomy.class_heads import ClassHead, class_heads
from regraft.anatomy.depths import parameter_depths
from regraft.anatomy.heads import Head, describe_heads, find_auxiliary_heads, first_convolution
from regraft.anatomy.inputs import Inputs
from regraft.anatomy.paths import is_within
from regraft.anatomy.tracing import LazyTrace, Trace
from regraft.card import Preprocessing
from regraft.zoo import preprocessing_of


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """Facts of one network, each worked out when it is first asked for, and kept; one run on shapes serves all.

    They depend on layers, shapes and the card, not on values, flags or modes: training and freezing leave them true, an
    edit or another card needs facts of its own. Each raises what the function raises that works it out.

    Attributes:
        model: The network.
        inputs: What its forward takes; guessed where None, see `summary`.
    """

    model: nn.Module
    inputs: Inputs | None = None

    @property
    def trace(self) -> Trace:
        """One forward: which layer runs when, and on which shapes. Its costs are not counted."""
        return self._run.read()

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of its images."""
        return preprocessing_of(self.model)

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """Its heads, in the order of execution."""
        return tuple(describe_heads(self._run))

    @cached_property
    def class_heads(self) -> tuple[ClassHead, ...]:
        """The heads that give scores of classes."""
        return tuple(class_heads(self.model, self.heads))

    def auxiliary_heads(self, beside: Sequence[str]) -> list[str]:
        """Return the paths of classifiers that run only while it trains, beside the main ones at these paths."""
        return find_auxiliary_heads(self._run, beside)

    @cached_property
    def head_parameters(self) -> frozenset[str]:
        """Names of the parameters of the heads, and of the norms and scales that come after them."""
        after = {name for head in self.heads for name in head.after}
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        return frozenset(after | {name for name in names if any(is_within(name, head.path) for head in self.heads)})

    @cached_property
    def first_convolution(self) -> str:
        """Path of the convolution that takes its images."""
        return first_convolution(self._run)

    @cached_property
    def depths(self) -> dict[str, int]:
        """Depth of each parameter, counted in blocks from the input."""
        return parameter_depths(self._run)

    @cached_property
    def _run(self) -> LazyTrace:
        return LazyTrace(self.model, self.inputs)
