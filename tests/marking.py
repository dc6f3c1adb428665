"""What a file of weights must not run. It leaves a mark where it runs, and does nothing else."""

from pathlib import Path

import torch


def leave_mark(path: str) -> torch.Tensor:
    """Make an empty file; return what a reader may take for weights."""
    Path(path).touch()
    return torch.zeros(1)


class Marked:
    """Leaves a mark when it is unpickled by somebody who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return leave_mark, (str(self.mark),)
