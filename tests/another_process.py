"""A process that knows nothing but what stands in a file: it loads what it is told to, and answers with digests."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LOADER = """
import json, sys, warnings, torch
from torch.utils._pytree import tree_leaves
from regraft import load
from regraft.checkpoint.file.digest import tensor_digest
warnings.simplefilter("ignore")
for line in sys.stdin:
    path, shape = json.loads(line)
    try:
        model = load(path)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            outputs = [tensor_digest(leaf) for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor)]
        buffers = [tensor_digest(buffer) for _, buffer in sorted(model.named_buffers())]
        answer = {"outputs": outputs, "buffers": buffers, "tensors": len(model.state_dict())}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Loader:
    """Asks the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._asked, self._answers = process.stdin, process.stdout

    def load(self, path: Path, shape: list[int]) -> dict[str, object]:
        """Return digests of the outputs for `images(shape)` and of the buffers, and the number of tensors."""
        self._asked.write(json.dumps([str(path), shape]) + "\n")
        self._asked.flush()
        return json.loads(self._answers.readline())


@contextmanager
def loading() -> Iterator[Loader]:
    with subprocess.Popen(
        [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Loader(process)
        assert process.stdin is not None
        process.stdin.close()


def same_images(shape: list[int]) -> torch.Tensor:
    """Return the images that the process runs a network on."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))
