"""Run a network on shapes alone, and record which layer ran when, on what, and at what cost.

The run happens on a structural twin of the model whose tensors are fake (`torch._subclasses.FakeTensor`): no weight is
read or copied, no arithmetic is done, and nothing of the model itself is touched.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regraft.anatomy.modes import preserved_randomness
from regraft.errors import ModelError
from regraft.zoo import preprocessing_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One call of one layer.

    Attributes:
        path: The layer's dotted path; empty for the model itself.
        began: Moment at which the call began; moments count calls' beginnings and ends.
        ended: Moment at which it ended.
        input_shapes: Shapes of the tensors that went in, batch included.
        output_shapes: Shapes of the tensors that came out, batch included.
        multiply_adds: Multiply-add operations of the call, those of inner layers included.
    """

    path: str
    began: int
    ended: int
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    multiply_adds: int


@dataclass(frozen=True)
class Trace:
    """One forward.

    Attributes:
        calls: Every call of every layer, in the order in which they began.
        first_uses: For each parameter that was used (by its name; each name of a shared one), the moment of its first
            use, on the clock of `Call.began`.
    """

    calls: tuple[Call, ...]
    first_uses: dict[str, int]


def trace(model: nn.Module, input_size: Sequence[int] | None = None) -> Trace:
    """Record every call of every layer and every parameter's first use during one evaluation-mode forward.

    Args:
        model: Any module whose forward takes one tensor.
        input_size: Shape of the input, batch included, as in (1, 3, 224, 224); guessed where not given.

    Raises:
        ModelError: The forward fails; the message names the layer and the shapes that went in.
    """
    size = tuple(input_size) if input_size is not None else guess_input_size(model)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _fake_twin(model, fake_mode)
    recorder = _Recorder(twin)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel hides its multiply-adds
        with preserved_randomness(), torch.no_grad(), fake_mode, recorder.counter, recorder.parameter_watch:
            twin(torch.empty(size, dtype=_precision(model)))
    except Exception as error:
        raise ModelError(recorder.describe_failure(type(model).__name__, size, error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    calls = sorted(recorder.calls, key=lambda call: call.began)
    first_uses = recorder.parameter_watch.first_uses
    named = twin.named_parameters(remove_duplicate=False)
    return Trace(tuple(calls), {name: first_uses[id(tensor)] for name, tensor in named if id(tensor) in first_uses})


def guess_input_size(model: nn.Module) -> Shape:
    """Guess the shape of one input, batch included: an image for a network that convolves, else a vector."""
    first = next((layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if isinstance(first, nn.Linear) and not hasattr(model, "preprocessing"):
        return (1, first.in_features)
    preprocessing = preprocessing_of(model)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else preprocessing.channels
    return (1, channels, preprocessing.size, preprocessing.size)


def _precision(model: nn.Module) -> torch.dtype:
    """Return the dtype of the inputs that `model` takes: that of its first floating-point parameter."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.get_default_dtype())


def _fake_twin(model: nn.Module, fake_mode: FakeTensorMode) -> nn.Module:
    """Copy the structure of `model` with a fake tensor in the place of each tensor, without hooks, for evaluation.

    The fakes are on the CPU wherever the model is, so that one on a GPU, or on the meta device, is traced alike.
    """
    with fake_mode:
        twin = copy.deepcopy(model, {id(tensor): _fake(tensor) for tensor in _tensors(model)})
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
    return twin.eval()


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():  # tensors kept as plain attributes
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


class _Recorder:
    """Hooks on every layer of a twin that write down its calls."""

    def __init__(self, twin: nn.Module) -> None:
        self.calls: list[Call] = []
        self.counter = FlopCounterMode(display=False)
        self.parameter_watch = _ParameterWatch(twin, self)
        self.now = 0
        self._running: list[tuple[str, str, int, int, tuple[Shape, ...]]] = []
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(self._begin(path), with_kwargs=True)
            module.register_forward_hook(self._end, with_kwargs=True)

    def describe_failure(self, model_name: str, size: Shape, error: Exception) -> str:
        """Say in which layer the forward failed, and on which shapes."""
        reason = str(error).strip().partition("\n")[0]
        if not self._running:
            return f"{model_name} fails on an input of shape {size}: {reason}. Pass the input_size that it expects."
        path, kind, _, _, shapes = self._running[-1]
        where = f"layer '{path}' ({kind})" if path else f"its own forward ({kind})"
        fed = ", ".join(map(str, shapes)) or "no tensor"
        return (
            f"{model_name} fails on an input of shape {size}: {where} was given {fed}: {reason}. "
            "Pass the input_size that it expects, batch included."
        )

    def _begin(self, path: str) -> Any:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            shapes = _shapes((args, kwargs))
            self.now += 1
            self._running.append((path, type(module).__name__, self.now, self.counter.get_total_flops(), shapes))

        return begin

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.now += 1
        path, _, began, operations_before, shapes = self._running.pop()
        operations = self.counter.get_total_flops() - operations_before
        self.calls.append(Call(path, began, self.now, shapes, _shapes(output), operations // 2))


class _ParameterWatch(TorchDispatchMode):
    """Sees every operation, and writes down when each parameter first takes part in one."""

    def __init__(self, twin: nn.Module, clock: _Recorder) -> None:
        super().__init__()
        self.first_uses: dict[int, int] = {}
        self._clock = clock
        self._waiting = {id(parameter) for parameter in twin.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self._waiting:
                self._waiting.discard(id(leaf))
                self.first_uses[id(leaf)] = self._clock.now
        return func(*args, **(kwargs or {}))


def _shapes(value: Any) -> tuple[Shape, ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
