"""Unwrap modules that only hold another network, such as `DataParallel`."""

from torch import nn
from torch.optim.swa_utils import AveragedModel

from regraft.torch_internals import COMPILED_CHILD, children_of

CARRIERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the network inside of `torch.compile`, `DataParallel`, `DistributedDataParallel` and `AveragedModel`.

    Returns:
        Its path within `model`, empty where nothing wraps it, and the network.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
    ('module', Linear(in_features=2, out_features=2, bias=True))
    """
    names = []
    while (name := _carried(model)) is not None:
        names.append(name)
        model = model.get_submodule(name)
    return ".".join(names), model


def sole_child(model: nn.Module) -> str | None:
    """Return the name of the one child that holds every parameter of `model`; None where there is no such child.

    >>> sole_child(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)))
    '1'
    """
    if next(model.parameters(recurse=False), None) is not None:
        return None
    holders = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    return holders[0] if len(holders) == 1 else None


def _carried(model: nn.Module) -> str | None:
    if COMPILED_CHILD in children_of(model):  # not by its class, as the compiler is slow to import
        return COMPILED_CHILD
    return "module" if isinstance(model, CARRIERS) else None
