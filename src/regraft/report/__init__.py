"""What happened, as one file that opens in any browser."""

from regraft.report.html import write_report

__all__ = ["write_report"]
