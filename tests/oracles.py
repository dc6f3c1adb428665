"""Independent ways to say what must not have changed."""

from typing import Any

import torch
from torch import nn

from regraft.card import ATTRIBUTE, card_of


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Write down everything about a model that a look at it must not change."""
    return {
        "bytes": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in model.state_dict(keep_vars=True).values()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [
            (list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()), list(m._backward_hooks.values()))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(module).keys() - {ATTRIBUTE}) for module in model.modules()],
        "card": card_of(model),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Compare two snapshots, tensors and gradients bit by bit."""
    ours, others = before["bytes"], after["bytes"]
    if ours.keys() != others.keys() or not all(identical(ours[name], others[name]) for name in ours):
        return False
    pairs = list(zip(before["gradients"], after["gradients"], strict=True))
    if not all(a is b if a is None or b is None else identical(a, b) for a, b in pairs):
        return False
    return all(before[key] == after[key] for key in before if key not in ("bytes", "gradients"))


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit by bit, so that NaN equals itself and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous().reshape(-1), b.detach().cpu().contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
