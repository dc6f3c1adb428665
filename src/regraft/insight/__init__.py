"""Questions asked of several runs."""

from regraft.insight.demo import DemoResult, Outcome, run_demo

__all__ = ["DemoResult", "Outcome", "run_demo"]
