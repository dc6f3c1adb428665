"""The training loop itself, and the matching loop that only looks."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode
from regraft.errors import LossError, ModelError
from regraft.training.losses import Loss, check_loss

Inputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Engine:
    """Where and in which precision arithmetic is done.

    Attributes:
        device: As torch names it.
        autocast_dtype: bfloat16 or float16 for mixed precision; None for plain float32.
        has_channels_last: Whether maps (N, C, H, W) have their channels last in memory, with which convolutions are
            faster, and equal up to rounding.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    has_channels_last: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler; it scales nothing unless the precision is float16 on a GPU."""
        enabled = self.autocast_dtype == torch.float16 and self.device.type == "cuda"
        return torch.amp.GradScaler(self.device.type, enabled=enabled)


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, torch.Tensor]],
    criterion: Loss,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    engine: Engine,
    *,
    mixup: float = 0.0,
) -> float:
    """Pass over the batches once, one optimizer step each, and return the mean loss per photo.

    Args:
        model: What is trained.
        batches: Pairs (inputs, targets).
        criterion: The loss.
        optimizer: Changes the weights.
        schedule: Changes the learning rate after each step.
        scaler: Scales gradients where the precision is float16.
        engine: Where and in which precision.
        mixup: Shape of the beta distribution that says how much of another example is mixed into each, be they
            images or features; 0: none is. Source: https://arxiv.org/abs/1710.09412, and for features
            https://arxiv.org/abs/1806.05236.

    Raises:
        LossError: The loss is not one number, or not finite; the message says at which step.
    """
    model.train()
    total, count = 0.0, 0
    for step, (inputs, targets) in enumerate(batches, start=1):
        targets = targets.to(engine.device)
        inputs, others, share = _mixed(inputs, targets, mixup)
        with engine.autocast():
            output = main_output(run(model, inputs, engine))
            loss = check_loss(criterion(output, targets))
            if share < 1:
                loss = share * loss + (1 - share) * criterion(output, others)
        if not torch.isfinite(loss):
            raise LossError(
                f"the loss is {loss.item()} at step {step} of this epoch (learning rate "
                f"{optimizer.param_groups[0]['lr']:.3g}). Try a tenth of the learning rate, --precision fp32, or look "
                "for extreme values in the data and the loss."
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        total, count = total + loss.item() * len(targets), count + len(targets)
    return total / max(count, 1)


def _mixed(inputs: Inputs, targets: torch.Tensor, mixup: float) -> tuple[Inputs, torch.Tensor, float]:
    """Mix another example of the batch into each: the inputs, the others' targets, and the share of the first."""
    if mixup == 0:
        return inputs, targets, 1.0
    share = float(torch.distributions.Beta(mixup, mixup).sample())
    order = torch.randperm(len(targets))
    given = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    mixed = tuple(torch.lerp(x[order.to(x.device)], x, share) if x.is_floating_point() else x for x in given)
    return (mixed[0] if isinstance(inputs, torch.Tensor) else mixed), targets[order.to(targets.device)], share


def score(
    model: nn.Module, batches: Iterable[tuple[Inputs, torch.Tensor]], engine: Engine
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `model` in evaluation mode over the batches; its own mode is as before afterwards.

    Returns:
        Outputs (N, K) in float32 and targets (N,), on the CPU, in order.
    """
    outputs, expected = [], []
    with evaluation_mode(model), torch.inference_mode(), engine.autocast():
        for inputs, targets in batches:
            outputs.append(main_output(run(model, inputs, engine)).float().cpu())
            expected.append(targets.cpu())
    return torch.cat(outputs), torch.cat(expected)


def run(model: nn.Module, inputs: Inputs, engine: Engine) -> Any:
    """Call `model` with one tensor, or with several, on the engine's device."""
    given = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    return model(*(_placed(tensor, engine) for tensor in given))


@contextlib.contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Keep the kernels of convolutions with their channels last in memory inside the block; no value changes."""
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    _lay_out(convolutions, torch.channels_last)
    try:
        yield
    finally:
        _lay_out(convolutions, torch.contiguous_format)


def _lay_out(layers: list[nn.Conv2d], memory_format: torch.memory_format) -> None:
    for layer in layers:
        for tensor in layer.parameters(recurse=False):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)


def _placed(tensor: torch.Tensor, engine: Engine) -> torch.Tensor:
    is_map = engine.has_channels_last and tensor.ndim == 4
    return tensor.to(engine.device, memory_format=torch.channels_last if is_map else torch.preserve_format)


def main_output(output: Any) -> torch.Tensor:
    """Take the scores out of what a model returns: a tensor, a tuple that begins with it, or an object with `.logits`.

    Raises:
        ModelError: It is none of these.
    """
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise ModelError(f"the model returned a {type(output).__name__}, expected a tensor of scores (N, K).")


def choose_engine(device: str, precision: str) -> Engine:
    """Resolve the options `device` and `precision`; see `TrainConfig`.

    Raises:
        ModelError: The device does not exist.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        if chosen.type == "meta":
            raise RuntimeError("it holds shapes without numbers")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the device '{device}' cannot be used: {reason}. Try --device cpu.") from error
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return Engine(chosen, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
