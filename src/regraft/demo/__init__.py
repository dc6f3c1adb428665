"""The demonstration: transfer learning against training from scratch, in a minute."""

from regraft.demo.page import write_demo_report
from regraft.demo.run import DemoResult, Outcome, run_demo

__all__ = ["DemoResult", "Outcome", "run_demo", "write_demo_report"]
