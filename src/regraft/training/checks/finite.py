"""Find the layer at fault where a loss is not finite."""

from collections.abc import Callable

import torch
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.training.steps.micro_batch import Inputs, buffers_restored


def first_nonfinite_layer(model: nn.Module, inputs: Inputs, forward: Callable[[nn.Module, Inputs], object]) -> str:
    """Run the network once more by `forward`, and describe the first layer whose output is not finite."""
    if not _is_finite(inputs):
        return "The inputs themselves are not finite."
    at_fault: list[str] = []
    names = {layer: path for path, layer in model.named_modules()}

    def look(layer: nn.Module, _: object, output: object) -> None:
        if not at_fault and not _is_finite(output):
            at_fault.append(names[layer])

    hooks = [layer.register_forward_hook(look) for layer in model.modules()]
    try:
        with torch.no_grad(), buffers_restored(model), preserved_randomness():
            forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not at_fault:
        return "Every layer's output is finite, so it is the loss itself."
    where = (
        f"'{at_fault[0]}' ({type(model.get_submodule(at_fault[0])).__name__})" if at_fault[0] else type(model).__name__
    )
    return f"The first layer whose output is not finite is {where}."


def _is_finite(value: object) -> bool:
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return all(bool(x.isfinite().all()) for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())
