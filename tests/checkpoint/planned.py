"""A plan in TOML, and the same by calls."""

from pathlib import Path

from torch import nn

import regraft

PLAN = """
source = "resnet18"
weights = "none"

[[edits]]
truncate = { drop = 1 }

[[edits]]
append = { layers = ["Linear(512, 40)", "ReLU()", "Linear(40, 3)"] }

[freeze]
until = "layer3.0"
"""


def write_plan(folder: Path) -> Path:
    path = folder / "plan.toml"
    path.write_text(PLAN)
    return path


def by_hand() -> nn.Module:
    model = regraft.create_model("resnet18", weights="none")
    model = regraft.append(regraft.truncate(model, drop=1), nn.Linear(512, 40), nn.ReLU(), nn.Linear(40, 3))
    regraft.freeze(model, until="layer3.0")
    return model
