"""A checkpoint is a model wherever a model is named, with its edits, weights and frozen layers."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import CheckpointError, ConfigError, ModelError

NAME = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def half_new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network with new last layers, of which the first half is frozen."""
    model = regraft.truncate(regraft.create_model(NAME, weights="none"), after="avgpool")
    model = regraft.append(model, nn.Flatten(), nn.Linear(576, 3))
    regraft.freeze(model, until="features.5")
    return regraft.save(model, tmp_path_factory.mktemp("half_new") / "model.safetensors")


def test_create_model_of_a_checkpoint_has_its_edits_weights_and_flags(half_new: Path) -> None:
    saved = regraft.load(half_new)
    for name in (half_new, str(half_new), str(half_new.parent)):  # a file, or the folder of a run
        model = regraft.create_model(name)
        assert model.training
        assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == {
            key: parameter.requires_grad for key, parameter in saved.named_parameters()
        }
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in model.state_dict().items())
        assert regraft.plan_of(model) == regraft.plan_of(saved)
    assert regraft.create_model(half_new, num_classes=7).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_create_model_of_a_checkpoint_without_weights_starts_anew(half_new: Path) -> None:
    saved = regraft.load(half_new)
    torch.manual_seed(7)
    model = regraft.create_model(half_new, weights="none")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == saved.state_dict().keys()
    assert not torch.equal(model.get_parameter("features.0.0.weight"), saved.get_parameter("features.0.0.weight"))
    filled = regraft.create_model(half_new, weights=half_new)
    assert torch.equal(filled.get_parameter("features.0.0.weight"), saved.get_parameter("features.0.0.weight"))


def test_create_model_prefers_the_name_of_a_network_to_a_folder(
    half_new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    os.link(half_new, Path(NAME, "model.safetensors"))
    assert regraft.create_model(NAME, weights="none")(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    assert regraft.create_model(f"./{NAME}")(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_create_model_refuses_an_edited_network_as_weights_of_another(half_new: Path) -> None:
    with pytest.raises(CheckpointError, match=r"would lose\s+its new layers and what is frozen.*is a model itself"):
        regraft.create_model(NAME, weights=half_new)
    with pytest.raises(ConfigError, match=r"has no registered weights 'IMAGENET1K_V1'\. Expected default"):
        regraft.create_model(half_new, weights="IMAGENET1K_V1")


def test_create_model_refuses_options_of_a_weights_file_without_one() -> None:
    with pytest.raises(ConfigError, match="are about weights in a file, and weights is 'none'"):
        regraft.create_model(NAME, weights="none", rename={"a": "b"})


def test_create_model_refuses_what_is_no_checkpoint_with_advice(shared: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pth")
    for load in (regraft.create_model, regraft.load):
        with pytest.raises(
            CheckpointError, match=r"a file of torch\.save: weights without an arch.*load_weights.*convert"
        ):
            load(str(tmp_path / "net.pth"))
        with pytest.raises(CheckpointError, match=r"no checkpoint in the folder .*: it holds no file of weights"):
            load(str(shared / "data" / "hymenoptera"))
    (tmp_path / "run" / "last").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"has not kept a model yet\. Continue it: regraft\.fit\(…, out=.*resume=True"
    ):
        regraft.load(tmp_path / "run")
    with pytest.raises(ModelError, match="no model 'nothing'"):
        regraft.create_model("nothing")


def test_create_model_takes_what_is_likely_only_if_told_to(shared: Path) -> None:
    name, file = "timm/tf_efficientnet_lite0", shared / "weights" / "efficientnet-lite0-57934424.pth"
    with pytest.raises(
        CheckpointError, match=r"only under other names: the names of 247 tensors differ.*To go on, .*likely"
    ):
        regraft.create_model(name, weights=file)
    report = regraft.create_model(name, weights=file, accept="likely", dry_run=True)
    assert (report.dry_run, report.share, len(report.proposed)) == (True, 1.0, 0)
    model = regraft.create_model(name, weights=file, accept="likely")
    known = torch.load(file, weights_only=True, map_location="cpu")
    assert torch.equal(model.get_parameter("conv_stem.weight"), known["_conv_stem.weight"])
    with pytest.raises(CheckpointError, match="fits timm/tf_efficientnet_lite0 only under other names"):
        regraft.create_model(name, weights=file, rename={"_conv_stem": "stem"})
