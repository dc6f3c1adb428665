"""Run a network on shapes alone, and record which layer ran when, on what, and at what cost.

The run happens on a structural twin of the model whose tensors have no values (on the meta device, or fake): no weight
is read or copied, no arithmetic is done, and nothing of the model itself is touched. A model whose forward depends on
values, not on shapes alone, is run for real instead, once and on a twin as well.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from regraft.anatomy.inputs import Arguments, Inputs, InputSize, arguments_for
from regraft.anatomy.inputs import Shape as Shape
from regraft.anatomy.modes import in_mode, preserved_randomness, silenced
from regraft.anatomy.recording import Call as Call
from regraft.anatomy.recording import Recorder, Trace
from regraft.anatomy.shape_copies import SHAPE_ONLY_COPIES, aliased_copy
from regraft.errors import ForwardError
from regraft.torch_internals import is_compiled

FAKES = "torch._subclasses.fake_tensor"  # its logger prints a traceback for what is raised as an error anyway


def trace(
    model: nn.Module,
    input_size: InputSize | None = None,
    *,
    inputs: Inputs | None = None,
    training: bool = False,
    counts: bool = False,
) -> Trace:
    """Record every call of every layer and every parameter's first use during one forward, in evaluation mode.

    Where the forward cannot run on shapes alone (`if x.sum() > 0`, `.item()`, NumPy), one real forward is recorded: on
    a copy that shares only the parameters, with the values of `inputs` or random ones. `Trace.note` says so.

    Args:
        model: Any module.
        input_size: Shape of the input, batch included, as in (1, 3, 224, 224), or one shape for each of several.
        inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, nested as forward takes them. Of
            tensors only shape and dtype count; everything else is passed on. Neither this nor `input_size`: guessed.
        training: Whether it runs in training mode instead.
        counts: Whether multiply-adds are counted, for which torch imports Triton, where it is installed.

    Raises:
        ForwardError: The forward fails; the message names the layer and the shapes that went in. Nothing was changed.
    """
    arguments = arguments_for(model, input_size, inputs)
    try:
        return _on_shapes(model, arguments, training, counts)
    except _StoppedError as stopped:
        if not _has_values(model):
            raise _failure(model, arguments, stopped) from stopped.__cause__
        reason = _reason(stopped)
    try:
        return _for_real(model, arguments, reason, training, counts)
    except _StoppedError as stopped:
        raise _failure(model, arguments, stopped) from stopped.__cause__


class LazyTrace:
    """The trace of a network in evaluation mode, which runs when it is first read, and is kept.

    Args:
        model: Any module.
        inputs: What its forward takes, see `trace`; guessed where not given.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None = None) -> None:
        self.model, self.inputs = model, inputs
        self._outcome: Trace | ForwardError | None = None

    def read(self) -> Trace:
        """Return the trace.

        Raises:
            ForwardError: The forward fails, see `trace`.
        """
        if self._outcome is None:
            try:
                self._outcome = trace(self.model, inputs=self.inputs)
            except ForwardError as error:
                self._outcome = error.with_traceback(None)  # its frames would keep the copy of the network
        if isinstance(self._outcome, ForwardError):
            raise self._outcome
        return self._outcome


class _StoppedError(Exception):
    """A forward stopped; the cause says why, the recorder (where it came so far) where."""

    def __init__(self, recorder: Recorder | None) -> None:
        super().__init__()
        self.recorder = recorder


def _on_shapes(model: nn.Module, arguments: Arguments, training: bool, counts: bool) -> Trace:
    recorder, problem = None, None
    for shape_only_copy in SHAPE_ONLY_COPIES:
        recorder = None
        try:
            with (
                preserved_randomness(),
                uncompiled(model),
                unfused_attention(),
                silenced(FAKES),
                shape_only_copy(model) as duplicate,
            ):
                recorder = Recorder(in_mode(duplicate, training), counts=counts)
                recorder.run(arguments.without_values())
                return recorder.result()
        except Exception as error:
            problem = error
    raise _StoppedError(recorder) from problem


def _for_real(model: nn.Module, arguments: Arguments, reason: str, training: bool, counts: bool) -> Trace:
    recorder = None
    try:
        with preserved_randomness(0), uncompiled(model), unfused_attention():
            recorder = Recorder(in_mode(aliased_copy(model), training), counts=counts)
            recorder.watch.protect(model.parameters())
            recorder.run(arguments.with_values(_device(model)))
    except Exception as error:
        raise _StoppedError(recorder) from error
    fed = "the given inputs" if arguments.are_values_given else "random numbers"
    return recorder.result(f"from one real forward on {fed}, as it cannot run on shapes alone: {reason}")


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let layers that `torch.compile` made run as they were before, as a compiled forward hides its layers."""
    if not any(is_compiled(layer) for layer in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Keep attention out of its fused kernel, which hides its multiply-adds."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _has_values(model: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _reason(stopped: _StoppedError) -> str:
    error = stopped.__cause__
    text = str(error).strip().partition("\n")[0]
    return text if len(text) > 3 else f"{type(error).__name__} {text}".strip()


def _failure(model: nn.Module, arguments: Arguments, stopped: _StoppedError) -> ForwardError:
    """Build the error that names the layer in which the forward failed, and its input shapes."""
    shapes = arguments.shapes
    kind = f"an input of shape {shapes[0]}" if len(shapes) == 1 else f"inputs of shapes {', '.join(map(str, shapes))}"
    advice = "the inputs that its forward takes" if arguments.are_values_given else "the input_size that it expects"
    failed_at = stopped.recorder.failed_at() if stopped.recorder else None
    reason = _reason(stopped)
    if failed_at is None:
        return ForwardError(f"{type(model).__name__} fails on {kind}: {reason}. Pass {advice}.", reason=reason)
    path, layer_type, given = failed_at
    where = f"layer '{path}' ({layer_type})" if path else f"its own forward ({layer_type})"
    fed = ", ".join(map(str, given)) or "no tensor"
    return ForwardError(
        f"{type(model).__name__} fails on {kind}: {where} was given {fed}: {reason}. Pass {advice}, batch included.",
        path=path,
        given=given,
        reason=reason,
    )
