"""Save, load in another process, same outputs bit for bit: a small member of every family of torchvision and timm."""

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from freezing.test_families import NAMES, images
from regraft import create_model, save
from regraft.checkpoint import read_header
from regraft.checkpoint.digest import tensor_digest

pytestmark = pytest.mark.slow

LOADER = """
import json, sys, warnings, torch
from torch.utils._pytree import tree_leaves
from regraft import load
from regraft.checkpoint.digest import tensor_digest
warnings.simplefilter("ignore")
for line in sys.stdin:
    path, shape = json.loads(line)
    try:
        model = load(path)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            answer = [tensor_digest(leaf) for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor)]
        answer += [tensor_digest(buffer) for _, buffer in sorted(model.named_buffers())]
    except Exception as error:
        answer = [f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def loader() -> Iterator[Any]:
    """Return a process that knows nothing but what stands in a file."""
    with subprocess.Popen(
        [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_elsewhere_gives_the_same(name: str, loader: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors
        model = create_model(name, weights="none")
        shape = list(images(model).shape)  # which also moves running statistics away from where they begin
        model.eval()
        expected = answers(model, torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    path = save(model, tmp_path / "model.safetensors")
    header = read_header(path)
    assert header is not None
    assert header.card.recipe is not None
    assert header.card.recipe.steps == ()
    loader.stdin.write(json.dumps([str(path), shape]) + "\n")
    loader.stdin.flush()
    found = json.loads(loader.stdout.readline())
    path.unlink()
    assert found == expected


def answers(model: nn.Module, inputs: torch.Tensor) -> list[str]:
    """Return the digests of the outputs, and of the buffers, those that no state dict has included."""
    with torch.no_grad():
        outputs = [tensor_digest(leaf) for leaf in tree_leaves(model(inputs)) if isinstance(leaf, torch.Tensor)]
    assert outputs
    return outputs + [tensor_digest(buffer) for _, buffer in sorted(model.named_buffers())]
