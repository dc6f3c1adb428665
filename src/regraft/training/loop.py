"""The training loop, and the matching evaluation loop."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode
from regraft.data.device_copies import HostCopy
from regraft.errors import DataError, LossError, ModelError, RunError
from regraft.progress import SILENT, Progress
from regraft.torch_internals import mark_as_stepped
from regraft.train_options import OnNan
from regraft.training.checks.finite import first_nonfinite_layer
from regraft.training.checks.targets import batch_loss
from regraft.training.losses import Loss, is_mean_over_samples
from regraft.training.ranks.group import OwnRows
from regraft.training.ranks.steps import SharedLive, SharedStep
from regraft.training.steps.compute import HALVES, ComputeContext
from regraft.training.steps.micro_batch import (
    SINGLE_SAMPLE_MESSAGE,
    Batch,
    Inputs,
    SingleSampleError,
    apply_mixup,
    backward_in_parts,
    rows,
    single_samples_refused,
)
from regraft.training.steps.tally import Tally, UnreadLoss
from regraft.wording import option

MAX_UNREAD = 2  # steps that a device is given before the loss of the first is read


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, torch.Tensor]],
    criterion: Loss,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    compute: ComputeContext,
    *,
    mixup: float = 0.0,
    on_nan: OnNan = "stop",
    tally: Tally | None = None,
    progress: Progress = SILENT,
) -> float:
    """Train for one epoch, with one optimizer step per batch, and return the mean loss per photo.

    A batch that does not fit into memory is split into micro-batches with gradient accumulation. The step is that of
    the whole batch for every loss, except for layers that mix samples (batch norm). A batch of a single photo, on which
    batch norm cannot be trained, is skipped.

    Args:
        model: The network to train.
        batches: Pairs (inputs, targets).
        criterion: The loss.
        optimizer: Its optimizer.
        schedule: Learning-rate schedule, advanced after each step.
        scaler: Gradient scaler, for float16.
        compute: Device and precision.
        mixup: See `TrainConfig`.
        on_nan: See `TrainConfig`.
        tally: Running totals of the epoch's earlier batches, which are continued; None starts at zero.
        progress: Reports when memory is short.

    Raises:
        LossError: The loss is not one number, or not finite; the message names the step and the layer.
        DataError: A label is not a class, or no batch has as many photos as batch norm needs.
        RunError: The device has no memory for a single photo.
    """
    model.train()
    tally = tally if tally is not None else Tally()
    shared = SharedLive(model, optimizer, compute.ranks, schedule.last_epoch) if compute.ranks.size > 1 else None
    for batch in batches:
        inputs, targets = batch
        tally.steps += 1
        whole = apply_mixup(inputs, targets.to(compute.device), mixup)
        own = (
            whole
            if shared is None or isinstance(batch, OwnRows)
            else whole.part(compute.ranks.share_of_batch(len(whole)))
        )
        if shared is None and not len(whole):  # of several ranks, one may have none
            raise DataError("a training batch has no samples. Give batches that have some.")
        optimizer.zero_grad()
        try:
            loss, count = _backward(model, own, criterion, scaler, compute, tally, progress, shared)
        except SingleSampleError:
            _skip_step(optimizer, schedule)
            progress.say("left out   a batch of one photo: batch norm cannot learn from one alone")
            continue
        if shared is not None and count == 0:  # no rank can read any of its photos
            continue
        if isinstance(loss, torch.Tensor):
            scaler.step(optimizer)
            scaler.update()
            mark_as_stepped(optimizer)
            error = functools.partial(_loss_error, model, own.inputs, compute, tally.steps, _rate(optimizer))
            tally.unread.append(UnreadLoss(HostCopy([loss]), count, error))
            tally.read(but=MAX_UNREAD)
        elif math.isfinite(loss) and (on_nan == "stop" or _has_finite_gradients(optimizer, scaler)):
            scaler.step(optimizer)
            scaler.update()
            mark_as_stepped(optimizer)  # a scaler may skip a step
            tally.add(loss, count)
        elif on_nan == "stop":
            raise _loss_error(model, own.inputs, compute, tally.steps, _rate(optimizer), loss)
        else:
            tally.skipped += 1
            _skip_step(optimizer, schedule)
            continue
        schedule.step()
    tally.read()
    if shared is not None:
        shared.finish()
    if tally.steps and not tally.count and not tally.skipped:
        raise DataError(SINGLE_SAMPLE_MESSAGE)
    if tally.skipped and not tally.count:
        raise LossError("no step of this epoch had a finite loss and gradient. Try a tenth of the learning rate.")
    return tally.mean


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def _loss_error(
    model: nn.Module, inputs: Inputs, compute: ComputeContext, step: int, rate: float, loss: float
) -> LossError:
    forward = functools.partial(_forward_alone, compute=compute)
    has_rows = len(inputs if isinstance(inputs, torch.Tensor) else inputs[0]) > 0
    return LossError(
        f"the loss is {loss} at step {step} of this epoch (learning rate {rate:.3g}). "
        f"{first_nonfinite_layer(model, inputs, forward) if has_rows else ''} Try a tenth of the learning "
        f"rate, {option('precision', 'fp32')}, or look for extreme values in the data and the loss; "
        f"{option('on_nan', 'skip')} leaves such steps out."
    )


def _skip_step(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Drop the gradients and advance the schedule without an optimizer step."""
    optimizer.zero_grad()
    mark_as_stepped(optimizer)
    schedule.step()


def _backward(
    model: nn.Module,
    batch: Batch,
    criterion: Loss,
    scaler: torch.amp.GradScaler,
    compute: ComputeContext,
    tally: Tally,
    progress: Progress,
    shared: SharedLive | None,
) -> tuple[float | torch.Tensor, int]:
    """Compute the gradients of a batch; the micro-batch size is halved on out-of-memory.

    Returns:
        The loss and the number of samples of the batch: with several ranks, of which `batch` has the rows of this one,
        those of the whole batch.

    With a step guard, the loss of a whole batch is returned unread, as a tensor.

    Raises:
        SingleSampleError: The batch is a single sample, on which the network cannot be trained.
    """
    count = len(batch)
    step = SharedStep(shared, batch) if shared is not None else None

    def forward(inputs: Inputs) -> torch.Tensor:
        size = len(inputs if isinstance(inputs, torch.Tensor) else inputs[0])
        with single_samples_refused(model, size), compute.autocast():
            return main_output(run(model, inputs, compute))

    def loss_of(outputs: torch.Tensor, part: Batch) -> torch.Tensor:
        with compute.autocast():
            loss = batch_loss(criterion, outputs, part.targets)
            if part.share < 1:
                loss = part.share * loss + (1 - part.share) * batch_loss(criterion, outputs, part.others)
        return loss

    while True:
        try:
            parts = batch.split(tally.at_a_time or max(count, 1), min_size=tally.min_at_a_time)
            if step is not None:
                return step.backward(forward, loss_of, parts, scaler.scale), step.count
            is_mean = len(parts) == 1 or is_mean_over_samples(criterion, batch.targets)
            is_read = not compute.is_step_guard(scaler)
            loss = backward_in_parts(
                forward, loss_of, model, batch, parts, scaler.scale, is_mean=is_mean, is_read=is_read
            )
            return loss, count
        except torch.OutOfMemoryError as error:
            at_a_time = min(count, tally.at_a_time or count)
            tally.at_a_time = _halved_size(at_a_time, compute, error, min_size=tally.min_at_a_time)
            message = f"{compute.device} has none for {at_a_time} photos at a time: {tally.at_a_time} from here on"
        except SingleSampleError:
            if count <= 1 or (step is not None and step.is_refused):
                if step is not None:
                    step.refuse()
                raise
            tally.min_at_a_time, tally.at_a_time = 2, max(2, tally.at_a_time or 2)
            message = "batch norm cannot learn from one photo alone: two or more from here on"
        # Outside of the except block, whose exception would keep the tensors of the failed forward alive.
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.empty_cache()
        progress.say(f"memory     {message}, in steps of {count} photos as before")


def _halved_size(size: int, compute: ComputeContext, error: torch.OutOfMemoryError, *, min_size: int = 1) -> int:
    """Return half of the micro-batch size, after it ran out of memory.

    Raises:
        RunError: The size cannot be halved: it is 1, or what batch norm needs.
    """
    if size <= min_size:
        reason = str(error).partition("\n")[0]
        photos = "a single photo" if min_size == 1 else "two photos, and batch norm cannot learn from one alone"
        raise RunError(
            f"{compute.device} has no memory for {photos} ({reason}). Try a smaller {option('image_size')}, "
            "freeze more layers, or use a smaller network."
        ) from error
    return (size + 1) // 2


def _has_finite_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    if scaler.is_enabled():
        return True  # the scaler checks by itself, and skips such a step
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(torch.isfinite(nn.utils.get_total_norm(gradients, norm_type=math.inf)))


def _forward_alone(model: nn.Module, inputs: Inputs, *, compute: ComputeContext) -> None:
    with compute.autocast():
        run(model, inputs, compute)


def score(
    model: nn.Module, batches: Iterable[tuple[Inputs, torch.Tensor]], compute: ComputeContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `model` in evaluation mode over the batches; the modes of its modules are restored afterwards.

    A batch that does not fit into memory is split, with the same result.

    Returns:
        Outputs (N, K) in float32 and targets (N,), on the CPU, in order.

    Raises:
        RunError: The device has no memory for a single photo.
        DataError: A batch is a single photo, and a norm without running statistics needs more.
    """
    outputs: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    with evaluation_mode(model), torch.inference_mode(), compute.autocast():
        for batch in batches:
            inputs, targets = compute.ranks.own_rows(batch)
            scores = _scores(model, inputs, len(targets), compute) if len(targets) else []
            scores, targets = compute.ranks.rows_of_all(scores, targets)
            outputs += scores
            expected.append(targets.cpu())
    return torch.cat(outputs), torch.cat(expected)


def _scores(model: nn.Module, inputs: Inputs, count: int, compute: ComputeContext) -> list[torch.Tensor]:
    """Return the scores of `count` photos; split the batch in half on out-of-memory."""
    try:
        with single_samples_refused(model, count):
            return [main_output(run(model, inputs, compute)).float().cpu()]
    except SingleSampleError as error:
        raise DataError(
            "a batch that is measured is a single sample, which a norm without running statistics cannot take. Use "
            "another batch size."
        ) from error
    except torch.OutOfMemoryError as error:
        fewer = _halved_size(count, compute, error)
    torch.cuda.empty_cache()  # outside of the except block, whose exception keeps tensors alive
    first, second = slice(0, fewer), slice(fewer, count)
    return [
        *_scores(model, rows(inputs, first), fewer, compute),
        *_scores(model, rows(inputs, second), count - fewer, compute),
    ]


def run(model: nn.Module, inputs: Inputs, compute: ComputeContext) -> Any:
    """Call `model` with one tensor or several, moved to the device.

    One tensor is a batch of images, which is cast to the type of the weights; several are features, which have it.
    """
    if not isinstance(inputs, torch.Tensor):
        return model(*(_to_device(tensor, compute) for tensor in inputs))
    is_cast = compute.input_dtype is not None and inputs.is_floating_point()
    return model(_to_device(inputs, compute).to(compute.input_dtype if is_cast else inputs.dtype))


def _to_device(tensor: torch.Tensor, compute: ComputeContext) -> torch.Tensor:
    is_map = compute.has_channels_last and tensor.ndim == 4
    return tensor.to(compute.device, memory_format=torch.channels_last if is_map else torch.preserve_format)


def main_output(output: Any) -> torch.Tensor:
    """Return the scores in a model's output: a tensor, a tuple that begins with it, or an object with `.logits`.

    Scores in 16 bits are cast to float32, so that a loss rounds neither its sum nor its targets.

    Raises:
        ModelError: The output is none of these.
    """
    scores = _scores_in(output)
    return scores.float() if scores.dtype in HALVES else scores


def _scores_in(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise ModelError(f"the model returned a {type(output).__name__}, expected a tensor of scores (N, K).")
