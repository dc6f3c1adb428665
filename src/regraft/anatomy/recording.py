"""Record the calls of a network's layers: order, shapes and costs."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regraft.anatomy.inputs import Arguments, Shape, shapes_of
from regraft.anatomy.origins import OriginRecorder, Output
from regraft.torch_internals import TorchDispatchMode, operation_schema, storage_id, tree_leaves

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Call:
    """One call of one layer.

    Attributes:
        path: The layer's dotted path; empty for the model itself.
        began: Moment at which the call began; moments count calls' beginnings and ends.
        ended: Moment at which it ended.
        input_shapes: Shapes of the tensors that went in, batch included.
        output_shapes: Shapes of the tensors that came out, batch included.
        multiply_adds: Multiply-add operations of the call, those of inner layers included; 0 where not counted.
        output_bytes: Bytes of the tensors that came out.
    """

    path: str
    began: int
    ended: int
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    multiply_adds: int
    output_bytes: int = 0


@dataclass(frozen=True)
class Trace:
    """One forward.

    Attributes:
        calls: Every call of every layer, in the order in which they began.
        first_uses: For each parameter that was used (by its name; each name of a shared one), the moment of its first
            use, on the clock of `Call.began`.
        sizes: Number of elements of each parameter and buffer, by its name; lazy ones as the forward made them.
        note: How it was run, where it was not on shapes alone.
        outputs: The tensors that came out, and the parameters that gave them; see `origins`.
        projecting: Names of the parameters that data was multiplied with.
    """

    calls: tuple[Call, ...]
    first_uses: dict[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    note: str | None = None
    outputs: tuple[Output, ...] = ()
    projecting: frozenset[str] = frozenset()

    @property
    def class_count(self) -> int | None:
        """K where the output of the network is one tensor of scores (N, K); else None."""
        shapes = next((call.output_shapes for call in self.calls if call.path == ""), ())
        return shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else None


class Recorder:
    """Records the calls of every layer of a copied network by hooks.

    Args:
        duplicate: The network, to which the hooks are added.
        counts: Whether multiply-adds are counted; they are 0 otherwise.
    """

    def __init__(self, duplicate: nn.Module, *, counts: bool = False) -> None:
        self.duplicate = duplicate
        self.calls: list[Call] = []
        self._counter = flop_counter() if counts else None
        self.origins = OriginRecorder()
        self.watch = ParameterWatch(lambda: self.now, self._note_origin)
        self.output: Any = None
        self.now = 0
        self._running: list[tuple[str, str, int, int, tuple[Shape, ...]]] = []
        for path, module in duplicate.named_modules():
            module.register_forward_pre_hook(self._begin(path), with_kwargs=True, prepend=True)
            module.register_forward_hook(self._end(path), with_kwargs=True)

    def run(self, arguments: Arguments) -> None:
        """Call the copy once, without gradients."""
        self.origins.begin(self.duplicate, (arguments.args, arguments.kwargs))
        with torch.no_grad(), self._counter or nullcontext(), self.watch:
            self.output = self.duplicate(*arguments.args, **arguments.kwargs)

    def result(self, note: str | None = None) -> Trace:
        """Return the recorded run."""
        first_uses = self.watch.first_uses
        named = list(self.duplicate.named_parameters(remove_duplicate=False))
        tensors = [*named, *self.duplicate.named_buffers(remove_duplicate=False)]
        return Trace(
            calls=tuple(sorted(self.calls, key=lambda call: call.began)),
            first_uses={name: first_uses[id(tensor)] for name, tensor in named if id(tensor) in first_uses},
            sizes={name: tensor.numel() for name, tensor in tensors if not nn.parameter.is_lazy(tensor)},
            note=note,
            outputs=self.origins.outputs(self.duplicate, self.output),
            projecting=self.origins.projection_parameters(self.duplicate),
        )

    def _note_origin(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        running = (path for path, *_ in self._running)  # of the layers whose forwards are running, the innermost last
        self.origins.record(func, args, kwargs, result, running)

    def failed_at(self) -> tuple[str, str, tuple[Shape, ...]] | None:
        """Return path, type and input shapes of the layer in which the run stopped; None where it did not begin."""
        if not self._running:
            return None
        path, kind, _, _, shapes = self._running[-1]
        return path, kind, shapes

    def _flops(self) -> int:
        return self._counter.get_total_flops() if self._counter is not None else 0

    def _begin(self, path: str) -> Any:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            shapes = shapes_of((args, kwargs))
            self.now += 1
            self._running.append((path, type(module).__name__, self.now, self._flops(), shapes))

        return begin

    def _end(self, path: str) -> Any:
        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._running[-1][0] != path:  # a forward that a hook stopped left the layers around it half-way
                self._close(None)
            self._close(output)

        return end

    def _close(self, output: Any) -> None:
        self.now += 1
        path, _, began, operations_before, shapes = self._running.pop()
        operations = self._flops() - operations_before
        tensors = [leaf for leaf in _leaves(output) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.calls.append(Call(path, began, self.now, shapes, shapes_of(tensors), operations // 2, size))


class ParameterWatch(TorchDispatchMode):
    """Dispatch mode that records when each parameter first takes part in an operation.

    After `protect`, an operation that would write to a parameter is refused before it happens.

    Args:
        now: Returns the current moment.
        note: Called with each operation, its arguments and its result.
    """

    def __init__(
        self, now: Callable[[], int] = lambda: 0, note: Callable[[Any, Any, Any, Any], None] | None = None
    ) -> None:
        super().__init__()
        self.first_uses: dict[int, int] = {}
        self._protected: set[int] = set()
        self._now, self._note = now, note

    def protect(self, parameters: Iterator[nn.Parameter]) -> None:
        """Refuse what would write to the memory of these parameters."""
        self._protected |= {storage_id(parameter) for parameter in parameters if not nn.parameter.is_lazy(parameter)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in self.first_uses:
                self.first_uses[id(leaf)] = self._now()
        if self._protected and operation_schema(func).is_mutable:
            self._refuse_writes(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self._note is not None:
            self._note(func, args, kwargs or {}, result)
        return result

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(operation_schema(func).arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
            if any(storage_id(tensor) in self._protected for tensor in written):
                raise RuntimeError("its forward writes to its own parameters, which a look must not do")


def flop_counter() -> "FlopCounterMode":
    """Return a dispatch mode that counts floating-point operations."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, where it is installed

    return FlopCounterMode(display=False)


def _leaves(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else tree_leaves(value)
