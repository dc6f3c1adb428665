"""Inspect a network without changing it."""

from regraft.anatomy.model_summary import summary
from regraft.anatomy.summary_table import LayerSummary, ModelSummary

__all__ = ["LayerSummary", "ModelSummary", "summary"]
