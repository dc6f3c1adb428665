"""`regraft train --weights`: weights that cannot be had, or that do not fit."""

import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from scene import Cli, assert_refused, nothing_written


def no_network(*_: object, **__: object) -> None:
    raise urllib.error.URLError("no route to host")


class CutOff:
    """A server's answer that is not the file that was asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        self.rest = [b"half a fi", b""]

    def info(self) -> Message:
        return Message()

    def read(self, _: int) -> bytes:
        return self.rest.pop(0)

    def __enter__(self) -> "CutOff":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("answer", "reason"), [(no_network, "no route to host"), (CutOff, "invalid hash value")])
def test_cli_train_says_how_to_go_on_where_weights_cannot_be_downloaded(
    answer: Any, reason: str, cli: Cli, photos: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(workplace / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", answer)
    monkeypatch.setattr("urllib.request.urlopen", answer)
    result = cli("train", photos, "--model", "squeezenet1_1", "--out", "run")
    assert_refused(
        result,
        "the weights of 'squeezenet1_1' cannot be downloaded",
        reason,
        "--weights FILE",
        "--weights none",
    )
    assert not Path("run").exists()
    assert [path for path in (workplace / "cache").rglob("*") if path.is_file()] == []


def test_cli_train_says_how_to_go_on_without_a_network_for_weights_of_timm(
    cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with nothing_written():
        assert_refused(
            cli("train", photos, "--model", "timm/mobilenetv3_small_050"),
            "the weights of 'timm/mobilenetv3_small_050' cannot be downloaded",
            "--weights none",
        )


def test_cli_train_refuses_real_weights_of_another_architecture(
    shared: Path, cli: Cli, photos: Path, workplace: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "mobilenet_v1.py"
    file = shared / "weights" / "resnet56-4bfd9763.th"
    with nothing_written():
        result = cli("train", photos, "--model", f"py:{example}:MobileNetV1", "--weights", file, "--trust-code")
        assert_refused(result, f"'{file}'", "MobileNetV1")


def test_cli_train_says_that_an_edited_network_is_a_model(cli: Cli, photos: Path, workplace: Path) -> None:
    assert (
        cli(
            "surgery", "Sequential(Linear(12, 4))", "--append", "ReLU()", "Linear(4, 2)", "--out", "two.safetensors"
        ).exit_code
        == 0
    )
    with nothing_written():
        result = cli("train", photos, "--weights", "two.safetensors")
        assert_refused(result, "'two.safetensors'", "another architecture than resnet18")
        assert_refused(cli("train", photos, "--accept", "likely", "--weights", "none"), "are about weights in a file")
        assert_refused(cli("train", photos, "--rename", "x", "--weights", "w.pth"), "'x' is not of the form OLD=NEW")


def test_cli_train_dry_run_shows_every_pair_and_trains_nothing(shared: Path, cli: Cli, photos: Path) -> None:
    weights = shared / "weights" / "efficientnet-lite0-57934424.pth"
    words = ("train", photos, "--model", "timm/tf_efficientnet_lite0", "--weights", weights, "--dry-run")
    with nothing_written():
        refused, taken = cli(*words), cli(*words, "--accept", "likely")
    assert refused.exit_code == taken.exit_code == 0
    assert refused.stdout.count("likely, not taken") == 247
    assert "--accept likely" in refused.stdout
    assert taken.stdout.count(" likely ") == 247
    assert "not taken" not in taken.stdout
