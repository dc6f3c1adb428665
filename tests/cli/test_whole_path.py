"""From photos to predictions and back, each step in a process of its own, on real photos and real weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def regraft(*arguments: object, cwd: Path) -> object:
    command = [sys.executable, "-m", "regraft", *map(str, arguments), "--json"]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path]:
    folder = tmp_path_factory.mktemp("whole")
    options = {
        "--model": f"py:{ROOT / 'examples' / 'mobilenet_v1.py'}:MobileNetV1",
        "--weights": shared / "weights" / "mobilenetV1X0.25_pretrain.tar",
        "--epochs": 4,
        "--image-size": 96,
        "--freeze-until": "stage3",
        "--out": "run",
    }
    flat = [part for pair in options.items() for part in pair]
    return regraft("train", shared / "data" / "car_vs_bicycle_mini", *flat, "--trust-code", cwd=folder), folder


def test_cli_evaluate_in_another_process_measures_the_same(trained: tuple[dict, Path], shared: Path) -> None:
    result, folder = trained
    measured = regraft(
        "evaluate", result["checkpoint"], shared / "data" / "car_vs_bicycle_mini", "--trust-code", cwd=folder
    )
    assert measured["accuracy"] == result["validation"]["accuracy"]
    assert measured["confusion"] == result["validation"]["confusion"]
    assert measured["count"] == 10
    assert measured["accuracy"] >= 0.8


def test_cli_predict_in_another_process_gives_the_same_labels(trained: tuple[dict, Path], shared: Path) -> None:
    result, folder = trained
    photos = shared / "data" / "car_vs_bicycle_mini" / "val"
    found = regraft("predict", result["checkpoint"], photos, "--trust-code", cwd=folder)
    right = sum(one["label"] == Path(one["path"]).parent.name for one in found)
    assert right / len(found) == result["validation"]["accuracy"]
    assert {one["label"] for one in found} <= {"bicycle", "car"}


def test_cli_predict_refuses_a_checkpoint_without_trust(trained: tuple[dict, Path]) -> None:
    result, folder = trained
    command = [sys.executable, "-m", "regraft", "predict", str(result["checkpoint"]), "."]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 2
    assert "--trust-code" in found.stderr
    assert found.stdout == ""
