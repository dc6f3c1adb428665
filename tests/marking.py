"""What a file of weights must not run. It makes an empty folder where it runs, and does nothing else."""

import os
from pathlib import Path


class Marked:
    """Leaves a mark when it is unpickled by somebody who trusts it: by a function of Python, as those are refused."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)
