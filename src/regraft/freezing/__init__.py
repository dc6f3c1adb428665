"""Select layers, freeze them, and give the rest to an optimizer."""

from regraft.freezing.auditing import Finding, audit
from regraft.freezing.flags import FreezeReport, freeze, unfreeze
from regraft.freezing.groups import build_optimizer, param_groups
from regraft.freezing.optimizer_sync import Followed, follow
from regraft.freezing.patterns import select
from regraft.freezing.schedule import Schedule
from regraft.freezing.state import freeze_state

__all__ = [
    "Finding",
    "Followed",
    "FreezeReport",
    "Schedule",
    "audit",
    "build_optimizer",
    "follow",
    "freeze",
    "freeze_state",
    "param_groups",
    "select",
    "unfreeze",
]
