"""Select layers, freeze them, and give the rest to an optimizer."""

from regraft.freezing.freeze import FreezeReport, freeze, unfreeze
from regraft.freezing.groups import build_optimizer, param_groups
from regraft.freezing.patterns import select

__all__ = ["FreezeReport", "build_optimizer", "freeze", "param_groups", "select", "unfreeze"]
