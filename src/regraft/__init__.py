"""regraft: take a trained network, look into it, freeze part of it, graft new layers on, train it on your own data.

The public names are imported when they are first used, so that `import regraft` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from regraft.version import __version__ as __version__

if TYPE_CHECKING:
    from regraft.advice import Advice as Advice
    from regraft.advice import Ranking as Ranking
    from regraft.advice.advise_model import advise as advise
    from regraft.anatomy import LayerSummary as LayerSummary
    from regraft.anatomy import ModelSummary as ModelSummary
    from regraft.anatomy import summary as summary
    from regraft.card import Card as Card
    from regraft.card import Preprocessing as Preprocessing
    from regraft.checkpoint import Diff as Diff
    from regraft.checkpoint import LoadReport as LoadReport
    from regraft.checkpoint import Plan as Plan
    from regraft.checkpoint import build_plan as build_plan
    from regraft.checkpoint import convert as convert
    from regraft.checkpoint import create_model as create_model
    from regraft.checkpoint import diff as diff
    from regraft.checkpoint import load as load
    from regraft.checkpoint import load_weights as load_weights
    from regraft.checkpoint import merge as merge
    from regraft.checkpoint import plan_of as plan_of
    from regraft.checkpoint import read_plan as read_plan
    from regraft.checkpoint import save as save
    from regraft.errors import RegraftError as RegraftError
    from regraft.freezing import Finding as Finding
    from regraft.freezing import FreezeReport as FreezeReport
    from regraft.freezing import Schedule as Schedule
    from regraft.freezing import audit as audit
    from regraft.freezing import build_optimizer as build_optimizer
    from regraft.freezing import follow as follow
    from regraft.freezing import freeze as freeze
    from regraft.freezing import freeze_state as freeze_state
    from regraft.freezing import param_groups as param_groups
    from regraft.freezing import select as select
    from regraft.freezing import unfreeze as unfreeze
    from regraft.frontier import Partition as Partition
    from regraft.frontier import partition as partition
    from regraft.photo_checks import DataFinding as DataFinding
    from regraft.photo_checks import DataReport as DataReport
    from regraft.photo_checks import check as check
    from regraft.progress import Progress as Progress
    from regraft.report import write_report as write_report
    from regraft.surgery import append as append
    from regraft.surgery import graft as graft
    from regraft.surgery import insert as insert
    from regraft.surgery import remove as remove
    from regraft.surgery import replace as replace
    from regraft.surgery import replace_head as replace_head
    from regraft.surgery import replace_stem as replace_stem
    from regraft.surgery import stitch as stitch
    from regraft.surgery import to_source as to_source
    from regraft.surgery import truncate as truncate
    from regraft.training import FitResult as FitResult
    from regraft.training import Metrics as Metrics
    from regraft.training import Prediction as Prediction
    from regraft.training import TrainConfig as TrainConfig
    from regraft.training import evaluate as evaluate
    from regraft.training import predict as predict
    from regraft.training.fitting import fit as fit
    from regraft.trials import Comparison as Comparison
    from regraft.trials import compare as compare
    from regraft.zoo import list_models as list_models

_HOMES = {
    "Advice": "advice",
    "Card": "card",
    "Comparison": "trials",
    "DataFinding": "photo_checks",
    "DataReport": "photo_checks",
    "Diff": "checkpoint",
    "Finding": "freezing",
    "FitResult": "training",
    "FreezeReport": "freezing",
    "LayerSummary": "anatomy",
    "LoadReport": "checkpoint",
    "Metrics": "training",
    "ModelSummary": "anatomy",
    "Partition": "frontier",
    "Prediction": "training",
    "Preprocessing": "card",
    "Progress": "progress",
    "Ranking": "advice",
    "RegraftError": "errors",
    "Schedule": "freezing",
    "TrainConfig": "training",
    "advise": "advice.advise_model",
    "append": "surgery",
    "audit": "freezing",
    "build_optimizer": "freezing",
    "compare": "trials",
    "create_model": "checkpoint",
    "diff": "checkpoint",
    "evaluate": "training",
    "fit": "training.fitting",
    "follow": "freezing",
    "freeze": "freezing",
    "freeze_state": "freezing",
    "graft": "surgery",
    "insert": "surgery",
    "list_models": "zoo",
    "load": "checkpoint",
    "load_weights": "checkpoint",
    "convert": "checkpoint",
    "merge": "checkpoint",
    "param_groups": "freezing",
    "partition": "frontier",
    "predict": "training",
    "remove": "surgery",
    "replace": "surgery",
    "replace_head": "surgery",
    "replace_stem": "surgery",
    "Plan": "checkpoint",
    "build_plan": "checkpoint",
    "check": "photo_checks",
    "plan_of": "checkpoint",
    "read_plan": "checkpoint",
    "save": "checkpoint",
    "select": "freezing",
    "stitch": "surgery",
    "summary": "anatomy",
    "to_source": "surgery",
    "truncate": "surgery",
    "unfreeze": "freezing",
    "write_report": "report",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regraft' has no attribute '{name}'")
    return getattr(importlib.import_module(f"regraft.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
