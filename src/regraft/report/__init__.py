"""The report of a run: one HTML file for any browser."""

from regraft.report.html import write_report

__all__ = ["write_report"]
