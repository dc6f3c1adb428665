"""What happened, as one file that opens in any browser."""

from regraft.report.html import render, write_page, write_report

__all__ = ["render", "write_page", "write_report"]
