"""Keep a model, and get it back."""

from regraft.checkpoint.build import create_model
from regraft.checkpoint.converting import convert
from regraft.checkpoint.diff import Diff, TensorDiff, diff
from regraft.checkpoint.format import Header, current_versions, read_header
from regraft.checkpoint.load_report import Adaptation, LoadReport, Match
from regraft.checkpoint.loading import load_weights
from regraft.checkpoint.plan import Plan, build_plan, plan_of, read_plan
from regraft.checkpoint.read import load
from regraft.checkpoint.write import save

__all__ = [
    "Adaptation",
    "Diff",
    "Header",
    "LoadReport",
    "Match",
    "Plan",
    "TensorDiff",
    "build_plan",
    "convert",
    "create_model",
    "current_versions",
    "diff",
    "load",
    "load_weights",
    "plan_of",
    "read_header",
    "read_plan",
    "save",
]
