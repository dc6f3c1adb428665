"""`regraft compare`: what it prints and writes."""

import json
from pathlib import Path

import pytest
import torch

import regraft
from regraft.cli import compare
from regraft.trials.ways import NAMES
from report.results import Page, assert_complete_in_itself
from scene import Cli, assert_refused, nothing_written, only_json


@pytest.fixture
def words(tiny_net: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr("regraft.trials.ways.MIN_STEPS", 1)
    model = regraft.create_model(tiny_net, weights="none", num_classes=10, trust_code=True)
    torch.save(model.state_dict(), "weights.pth")
    return ["compare", photos, "--model", tiny_net, "--weights", "weights.pth", "--trust-code", "--epochs", 3]


def test_cli_compare_writes_a_report_and_prints_what_is_in_it(cli: Cli, words: list[object]) -> None:
    words = [*words, "--images", "1,all", "--ways", "scratch,probe", "--seeds", 2]
    printed = cli(*words)
    assert printed.exit_code == 0, printed.stderr
    out = Path("runs/photos-compare")
    assert {path.name for path in out.iterdir()} == {
        *("cells", "comparison.csv", "comparison.json", "comparison.svg", "grid.json", "report.html")
    }
    page = Page((out / "report.html").read_text())
    assert_complete_in_itself(page)
    answer = only_json(cli(*words, "--json").stdout)
    assert Path(answer["report"]).is_file()
    assert [(point["way"], point["images"]) for point in answer["points"]] == [
        *(("scratch", "1"), ("scratch", "all"), ("probe", "1"), ("probe", "all"))
    ]
    for point in answer["points"]:
        text = f"{point['accuracy_mean']:.3f} ± {point['accuracy_std']:.3f}"
        assert text in printed.stdout
        assert text in page.text
    for way in answer["ways"]:
        assert all(command in page.text for command in way["commands"])
    for claim in answer["claims"]:
        assert claim["text"] in page.text
    assert len(answer["runs"]) == 8
    assert answer["runs"] == json.loads((out / "comparison.json").read_text())["runs"]


def test_cli_compare_refuses_in_flags_what_cannot_work(cli: Cli, words: list[object]) -> None:
    assert compare.KNOWN_WAYS.split(",") == list(NAMES)
    with nothing_written():
        assert_refused(cli(*words, "--ways", "lpft"), "no way of training 'lpft'. Nearest: 'lp-ft'")
        assert_refused(cli(*words, "--images", "x"), "--images has 'x', expected numbers from 1, or 'all'.")
        assert_refused(cli(*words, "--images", ","), "--images is empty")
        assert_refused(cli(*words, "--images", "9"), "--images asks for 9 images a class or more, and 'cats' has 5 ")
    Path("more.toml").write_text("lr = 0.1\n")
    assert_refused(cli(*words, "--config", "more.toml"), "--lr is not for a comparison", "--ways NAMES")
