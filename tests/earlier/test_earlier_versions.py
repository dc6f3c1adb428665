"""What an earlier version wrote loads, goes on, and is found: checkpoints, deltas, plans, runs and caches.

`v0_1/make.py` wrote the files with regraft 0.1 before its modules were moved and renamed.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import regraft
from training.factories import Lines

IS_SAME_TORCH = (Path(__file__).parent / "v0_1/torch.txt").read_text() == torch.__version__
OPTIONS = {"batch_size": 4, "lr": 0.01, "augment": "none", "device": "cpu"}


@pytest.fixture(autouse=True)
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "v0_1"
    shutil.copytree(Path(__file__).parent / "v0_1", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["small", "edited", "delta"])
def test_load_of_earlier_versions_gives_the_same_outputs(name: str) -> None:
    model = regraft.load(f"{name}.safetensors", trust_code=True).eval()
    images = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(images), torch.from_numpy(np.load("outputs.npz")[name]), atol=1e-6)
    assert not model.get_parameter("conv1.weight").requires_grad


def test_load_and_save_of_earlier_versions_write_the_same_file(tmp_path: Path) -> None:
    model = regraft.load("small.safetensors", trust_code=True)
    again = regraft.save(model, tmp_path / "again.safetensors", metadata={"author": "a user"})
    before, after = load_file("small.safetensors"), load_file(again)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_read_plan_builds_the_network() -> None:
    model = regraft.build_plan(regraft.read_plan("plan.toml"), trust_code=True)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "conv1.weight",
        "conv1.bias",
        "bn1.weight",
        "bn1.bias",
    ]


def test_fit_resume_ends_as_the_run_that_was_never_stopped() -> None:
    result = regraft.fit("py:own.py:Small", "photos", out="run", resume=True, epochs=4, trust_code=True, **OPTIONS)
    whole = regraft.load("whole/model.safetensors", trust_code=True)
    for name, tensor in whole.state_dict().items():
        rounding = 1e-5 if IS_SAME_TORCH else 1e-3  # each torch has kernels of its own
        assert torch.allclose(tensor, result.model.state_dict()[name], atol=rounding), name
    assert len(result.history) == 4


@pytest.mark.skipif(not IS_SAME_TORCH, reason="kept for another torch")
def test_fit_finds_what_was_computed_once(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(earlier / "cache"))
    lines = Lines()
    model = regraft.load("small.safetensors", trust_code=True)
    regraft.fit(model, "photos", epochs=1, progress=lines, decoder="pillow", **OPTIONS)  # the only one then
    assert "found in the cache" in lines
