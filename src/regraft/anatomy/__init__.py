"""Look into a network and change nothing."""

from regraft.anatomy.summary import LayerSummary, ModelSummary, summary

__all__ = ["LayerSummary", "ModelSummary", "summary"]
