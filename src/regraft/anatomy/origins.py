"""Trace each output of a network back to the projections that computed it last: the heads.

Every operation of one forward is observed as it is dispatched. An operation that multiplies data with parameters (a
matrix product, a convolution, an embedding lookup) is a *projection*, and its result originates in that projection
alone. All other operations (activations, norms, scales, sums, concatenations, views) propagate the origins of their
inputs and add the parameters that they use. A projection whose result feeds another one on the way to an output is not
an origin: in a residual stream only the last block counts. The origins of the outputs are the heads, whatever the
layers are named, wherever they are registered, and whether they are modules or bare parameters.

Origins are stored per storage, not per tensor: views share a storage, and a write to a slice of a tensor affects all of
it. The simpler rule, the layer that ends last, fails: a module with parameters of its own beside its layers (the class
token of a vision transformer) ends after its own classifier, and of several heads only one is last.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.torch_internals import keystr, operation_schema, storage_id, tree_flatten_with_path, tree_leaves

FACTORS: dict[str, tuple[int, ...]] = {  # positions of the arguments that an operation multiplies
    "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "vdot": (0, 1), "matmul": (0, 1), "linear": (0, 1),
    "addmm": (1, 2), "addmv": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2), "addr": (1, 2),
    "convolution": (0, 1), "_convolution": (0, 1), "embedding": (0, 1), "_embedding_bag": (0, 1),
    "_embedding_bag_forward_only": (0, 1), "_trilinear": (0, 1, 2),
}  # fmt: skip
PROPAGATING = frozenset(  # take data and parameters and are not pointwise, but are no projections
    (
        *("cat", "stack", "copy", "expand", "gather", "index", "_unsafe_index", "index_put", "index_copy", "index_add"),
        *("index_select", "masked_fill", "slice_scatter", "select_scatter", "where", "max", "min"),
    )
)
PROPAGATING_WORDS = ("norm", "attention", "scatter", "prelu", "grid_sampler", "roi_")  # in names of fused operations


@dataclass(frozen=True)
class Projection:
    """One multiplication of data with parameters.

    Attributes:
        parameters: The names of each parameter: several if it is shared.
        running: Paths of the layers whose forward was running, the innermost last.
    """

    parameters: tuple[tuple[str, ...], ...]
    running: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """A projection that an output originates in, and the parameters that were used after it (norms, scales)."""

    projection: Projection
    after: tuple[str, ...]


@dataclass(frozen=True)
class Output:
    """One tensor of a network's output.

    Attributes:
        name: Path in the output, as in `['aux']` or `[0]`; empty if the tensor is the output itself.
        shape: Shape, batch included.
        origins: Its origins, in execution order.
    """

    name: str
    shape: tuple[int, ...]
    origins: tuple[Origin, ...]


@dataclass
class _Value:
    """What a storage was computed from.

    Attributes:
        is_data: Whether it depends on the network's inputs.
        parameters: The `id` of each parameter that it was computed from, while `origins` do not contain it yet.
        origins: For data: index of each projection (None: the inputs) → parameters that were used after it.
    """

    is_data: bool
    parameters: frozenset[int]
    origins: Mapping[int | None, frozenset[int]]


CONSTANT = _Value(False, frozenset(), {})


class OriginRecorder:
    """Records the origins of each storage, operation by operation."""

    def __init__(self) -> None:
        self._values: dict[Any, _Value] = {}
        self._projections: list[tuple[frozenset[int], tuple[str, ...], frozenset[int]]] = []
        self._kept: dict[int, nn.Parameter] = {}  # references, so that no new object gets the `id` of a dead one
        self._projected: set[int] = set()

    def begin(self, model: nn.Module, inputs: Any) -> None:
        """Register the tensors among the network's inputs as data, and the parameters as parameters."""
        for parameter in model.parameters():
            if not nn.parameter.is_lazy(parameter):
                self._values[_storage_key(parameter)] = self._value(parameter)
        for tensor in _tensors(inputs):
            self._values[_storage_key(tensor)] = _Value(True, frozenset(), {None: frozenset()})

    def record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, running: Iterable[str]
    ) -> None:
        """Record one operation after it has run."""
        inputs = [self._value(tensor) for tensor in _tensors((args, kwargs))]
        results = list(_tensors(result))
        value = _merged(inputs)
        if value.is_data and value.parameters:
            factors = self._factors(func, args, kwargs, results)
            if factors:
                value = self._project(factors, value, tuple(running))
            else:
                after = {key: passed | value.parameters for key, passed in value.origins.items()}
                value = _Value(True, frozenset(), after)
        for tensor in results:
            self._values[_storage_key(tensor)] = value

    def outputs(self, model: nn.Module, result: Any) -> tuple[Output, ...]:
        """Return the origins of each tensor in the network's output."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)

        def named(identities: Iterable[int]) -> list[tuple[str, ...]]:
            return sorted(tuple(names[identity]) for identity in identities if identity in names)

        leaves = [(name, leaf) for name, leaf in _named_leaves(result) if isinstance(leaf, torch.Tensor)]
        values = [self._value(leaf) for _, leaf in leaves]
        reached = self._upstream({number for value in values for number in value.origins if number is not None})
        outputs = []
        for (name, leaf), value in zip(leaves, values, strict=True):
            own = sorted(number for number in value.origins if number is not None and number not in reached)
            origins = []
            for number in own:
                parameters, running, _ = self._projections[number]
                after = tuple(name for shared in named(value.origins[number]) for name in shared)
                origins.append(Origin(Projection(tuple(named(parameters)), running), after))
            outputs.append(Output(name, tuple(leaf.shape), tuple(origins)))
        return tuple(outputs)

    def projection_parameters(self, model: nn.Module) -> frozenset[str]:
        """Return the names of all parameters of projections."""
        parameters = model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in parameters if id(parameter) in self._projected)

    def _value(self, tensor: torch.Tensor) -> _Value:
        if isinstance(tensor, nn.Parameter):
            self._kept[id(tensor)] = tensor
            return _Value(False, frozenset({id(tensor)}), {})
        return self._values.get(_storage_key(tensor), CONSTANT)

    def _factors(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Any]) -> frozenset[int]:
        """Return the parameters that an operation multiplies data with; empty if it is no projection."""
        name = operation_schema(func).name.partition("::")[2]
        bare = name.rstrip("_")
        if bare in PROPAGATING or any(word in name for word in PROPAGATING_WORDS):
            return frozenset()
        if torch.Tag.pointwise in func.tags:
            # The product with each row of a weight, as in `(x[:, None] * self.prototypes).sum(-1)`.
            data = [tensor for tensor in _tensors((args, kwargs)) if self._value(tensor).is_data]
            is_outer = results and results[0].numel() > max(tensor.numel() for tensor in data)
            constants = [tensor for tensor in _tensors((args, kwargs)) if not self._value(tensor).is_data]
            if not is_outer or max((tensor.ndim for tensor in constants), default=0) < 2:
                return frozenset()
            factors = constants
        elif bare in FACTORS:
            factors = [args[position] for position in FACTORS[bare] if position < len(args)]
            if not any(self._value(tensor).is_data for tensor in factors):
                return frozenset()
        else:
            factors = [tensor for tensor in _tensors((args, kwargs)) if tensor.ndim > 1]
        parameters = frozenset[int]().union(*(self._static(tensor) for tensor in factors))
        if not parameters:
            return parameters
        return parameters.union(*(self._static(tensor) for tensor in _tensors((args, kwargs))))

    def _static(self, tensor: torch.Tensor) -> frozenset[int]:
        """Return the parameters that a constant tensor was computed from; empty for data."""
        value = self._value(tensor)
        return frozenset() if value.is_data else value.parameters

    def _project(self, factors: frozenset[int], value: _Value, running: tuple[str, ...]) -> _Value:
        parents = frozenset(number for number in value.origins if number is not None)
        self._projections.append((factors, running, parents))
        self._projected |= factors
        return _Value(True, frozenset(), {len(self._projections) - 1: frozenset()})

    def _upstream(self, numbers: set[int]) -> set[int]:
        """Return all projections upstream of `numbers`."""
        reached: set[int] = set()
        waiting = [parent for number in numbers for parent in self._projections[number][2]]
        while waiting:
            number = waiting.pop()
            if number not in reached:
                reached.add(number)
                waiting += self._projections[number][2]
        return reached


def _merged(values: list[_Value]) -> _Value:
    parameters = frozenset[int]().union(*(value.parameters for value in values)) if values else frozenset()
    origins: dict[int | None, frozenset[int]] = {}
    for value in values:
        for number, after in value.origins.items():
            origins[number] = origins.get(number, frozenset()) | after
    return _Value(any(value.is_data for value in values), parameters, origins)


def _named_leaves(value: Any) -> list[tuple[str, Any]]:
    plain = dict(value) if isinstance(value, Mapping) else value  # transformers 5.0 registers its dicts without names
    try:
        return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(plain)[0]]
    except ValueError:  # of a class that torch knows how to flatten, and not how to name its parts
        return [(f"[{position}]", leaf) for position, leaf in enumerate(tree_leaves(plain))]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _storage_key(tensor: torch.Tensor) -> Any:
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse, quantized or of a subclass without a storage
        return id(tensor)
