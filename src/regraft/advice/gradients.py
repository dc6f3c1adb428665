"""One step of the whole network on a few photos: the gradient of every block, and the seconds from every depth on."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.advice.activations import first_tensor
from regraft.anatomy.modes import evaluation_mode
from regraft.training.loop import main_output
from regraft.training.steps.compute import ComputeContext


@dataclass(frozen=True)
class StepMeasurement:
    """What a forward and backward pass of the whole network gave.

    Attributes:
        gradients: Gradient of the mean loss by parameter, on the CPU.
        seconds: For each boundary, the seconds a photo of everything after it, forward and backward.
        whole_s: Seconds a photo of the whole network.
    """

    gradients: dict[str, torch.Tensor]
    seconds: dict[str, float]
    whole_s: float


def relative_gradient_norm(gradients: Mapping[str, torch.Tensor], model: nn.Module, names: Sequence[str]) -> float:
    """Return the relative gradient norm of a group of parameters: ‖g‖ / ‖θ‖.

    g is the gradient of the mean loss over the photos with respect to the parameters θ of the group, all of them as one
    vector: RGN = √(Σ gᵢ²) / √(Σ θᵢ²). A large one says that a small relative change of these parameters lowers the loss
    much. Groups without a gradient, or whose parameters are all zero, have 0.

    Source: Lee et al. 2023, Surgical fine-tuning, https://arxiv.org/abs/2210.11466, section 4.1 (Auto-RGN).
    """
    parameters = dict(model.named_parameters())
    squares = sum(float(gradients[name].double().square().sum()) for name in names if name in gradients)
    size = sum(float(parameters[name].detach().double().square().sum()) for name in names if name in parameters)
    return (squares / size) ** 0.5 if size else 0.0


def measure_step(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    layers: Sequence[str],
    compute: ComputeContext,
) -> StepMeasurement:
    """Run forward and backward over some batches, in evaluation mode; the least seconds of a batch count.

    The network's flags and gradients are as before afterwards.

    Args:
        model: The network, on its device.
        batches: Pairs (inputs, targets) on that device, all of one size.
        loss: Mean loss of (outputs, targets).
        layers: Paths of the boundaries.
        compute: Device and precision.
    """
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    clock = _Clock(model, layers, compute.device)
    total = sum(len(targets) for _, targets in batches)
    try:
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        with evaluation_mode(model), torch.enable_grad():
            for inputs, targets in batches:
                clock.begin()
                with compute.autocast():
                    value = loss(main_output(model(inputs)).float(), targets)
                clock.turn()
                (value * (len(targets) / total)).backward()
                clock.end(len(targets))
        gradients = {
            name: parameter.grad.detach().float().cpu()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        clock.remove()
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
    return StepMeasurement(gradients, clock.after, clock.whole_s)


class _Clock:
    """Notes when each layer's output and its gradient are there."""

    def __init__(self, model: nn.Module, layers: Sequence[str], device: torch.device) -> None:
        self.after: dict[str, float] = {}
        self.whole_s = float("inf")
        self._device, self._began, self._turned = device, 0.0, 0.0
        self._forward: dict[str, float] = {}
        self._backward: dict[str, float] = {}
        self._handles = [model.get_submodule(layer).register_forward_hook(self._note(layer)) for layer in layers]

    def begin(self) -> None:
        self._forward, self._backward, self._began = {}, {}, self._now()

    def turn(self) -> None:
        self._turned = self._now()

    def end(self, photos: int) -> None:
        ended = self._now()
        self.whole_s = min(self.whole_s, (ended - self._began) / photos)
        for layer, moment in self._forward.items():
            backward = self._backward.get(layer, ended) - self._turned
            seconds = (self._turned - moment + backward) / photos
            self.after[layer] = min(self.after.get(layer, seconds), seconds)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, layer: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._forward[layer] = self._now()
            tensor = first_tensor(output)
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _: self._backward.__setitem__(layer, self._now()))

        return hook

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
