"""Save, load, convert and compare models and their weights."""

from regraft.checkpoint.comparison import Diff, TensorDiff, diff
from regraft.checkpoint.conversion import convert
from regraft.checkpoint.create import create_model
from regraft.checkpoint.delta import merge
from regraft.checkpoint.file.format import Base, Header, current_versions, read_header
from regraft.checkpoint.matching.load_report import Adaptation, LoadReport, Match
from regraft.checkpoint.matching.loading import load_weights
from regraft.checkpoint.plan import Plan, build_plan, plan_of, read_plan
from regraft.checkpoint.read import load, load_outline
from regraft.checkpoint.write import save

__all__ = [
    "Adaptation",
    "Base",
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
    "load_outline",
    "load_weights",
    "merge",
    "plan_of",
    "read_header",
    "read_plan",
    "save",
]
