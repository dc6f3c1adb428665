"""Independent ways to say what must not have changed."""

import torch
from torch import nn

from regraft.card import ATTRIBUTE, card_of


def snapshot(model: nn.Module) -> dict[str, object]:
    """Write down everything about a model that a look at it must not change."""
    return {
        "bytes": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "identities": [id(tensor) for tensor in model.state_dict(keep_vars=True).values()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [
            (list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()), list(m._backward_hooks.values()))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(module).keys() - {ATTRIBUTE}) for module in model.modules()],
        "card": card_of(model),
    }


def same(before: dict[str, object], after: dict[str, object]) -> bool:
    """Compare two snapshots, tensors bit by bit."""
    ours, theirs = before["bytes"], after["bytes"]
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    tensors = ours.keys() == theirs.keys() and all(identical(ours[name], theirs[name]) for name in ours)
    return tensors and all(before[key] == after[key] for key in before if key not in ("bytes", "gradients"))


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit by bit, so that NaN equals itself and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous().reshape(-1), b.detach().cpu().contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
