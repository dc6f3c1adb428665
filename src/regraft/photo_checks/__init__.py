"""What is wrong with photos before a network is trained on them: `check`."""

from regraft.photo_checks.checking import check
from regraft.photo_checks.data_report import DataFinding, DataReport
from regraft.photo_checks.label_errors import label_suspects

__all__ = ["DataFinding", "DataReport", "check", "label_suspects"]
