"""Save, load in another process, same outputs bit for bit: a small member of every family of torchvision and timm."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from another_process import Loader, loading, same_images
from families import SOME_NAMES, images
from regraft import create_model, save
from regraft.checkpoint import read_header
from regraft.checkpoint.file.digest import tensor_digest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with loading() as found:
        yield found


@pytest.mark.parametrize("name", SOME_NAMES)
def test_load_in_another_process_gives_the_same_for_every_family(name: str, loader: Loader, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors
        model = create_model(name, weights="none")
        shape = list(images(model).shape)  # which also moves running statistics away from where they begin
        model.eval()
        expected = answers(model, same_images(shape))
    path = save(model, tmp_path / "model.safetensors")
    header = read_header(path)
    assert header is not None
    assert header.card.recipe is not None
    assert header.card.recipe.steps == ()
    found = loader.load(path, shape)
    path.unlink()
    assert found == expected


def answers(model: nn.Module, inputs: torch.Tensor) -> dict[str, object]:
    """Return the digests of the outputs, and of the buffers, those that no state dict has included."""
    with torch.no_grad():
        outputs = [tensor_digest(leaf) for leaf in tree_leaves(model(inputs)) if isinstance(leaf, torch.Tensor)]
    assert outputs
    buffers = [tensor_digest(buffer) for _, buffer in sorted(model.named_buffers())]
    return {"outputs": outputs, "buffers": buffers, "tensors": len(model.state_dict())}
