"""`regraft advise`."""

from pathlib import Path

import pytest

from hostile.bad_folders import a_file, empty, missing
from report.results import Page, assert_complete_in_itself
from scene import Cli, assert_refused, nothing_written, only_json


def words(tiny_net: str, photos: Path) -> tuple[object, ...]:
    return ("advise", tiny_net, photos, "--weights", "none", "--trust-code")


def test_cli_advise_prints_a_table_and_the_command_that_follows(
    cli: Cli, tiny_net: str, photos: Path, workplace: Path
) -> None:
    result = cli(*words(tiny_net, photos), "--report", "advice.html", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["train", "accuracy", "RGN", "LogME", "trained", "epoch", "memory", "file"]
    assert sum(line.startswith("* ") for line in lines) == 1
    assert max(map(len, lines[: lines.index("")])) <= 80
    command = next(line for line in lines if line.startswith("next"))
    assert f"--model {tiny_net} --weights none --seed 3 --trust-code --" in command.replace("'", "")
    page = Page((workplace / "advice.html").read_text())
    assert_complete_in_itself(page)
    assert "head only" in page.text
    following = cli(*command.split()[2:], "--epochs", 1, "--batch-size", 4, "--out", "run", "--json")
    assert following.exit_code == 0, following.stderr


def test_cli_advise_ranks_networks_and_prints_json(cli: Cli, saved: Path, photos: Path) -> None:
    result = cli("advise", saved, saved, photos, "--trust-code", "--json")
    value = only_json(result.stdout)
    assert [advice["model"] for advice in value["advices"]] == [str(saved)] * 2
    assert {"name", "layer", "score", "error", "logme", "relative_gradient", "trainable", "epoch_s"} <= {
        *value["advices"][0]["depths"][0]
    }


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ("no folder '", "bad' (looked from ")),
        (empty, ("bad' has nothing in it. Expected a folder of photos for each class",)),
        (a_file, ("bad' is a file", "expected a folder")),
    ],
    ids=["missing", "empty", "a file"],
)
def test_cli_advise_refuses_a_bad_folder(
    make: object, parts: tuple[str, ...], cli: Cli, tiny_net: str, workplace: Path
) -> None:
    make(workplace / "bad")  # type: ignore[operator]
    with nothing_written():
        assert_refused(cli(*words(tiny_net, workplace / "bad")), *parts)


def test_cli_advise_refuses_bad_words(cli: Cli, tiny_net: str, photos: Path) -> None:
    with nothing_written():
        assert_refused(cli("advise", "resnet18"), "one word is too few", "regraft advise resnet18 photos/")
        assert_refused(cli(*words(tiny_net, photos), "--budget", "soon"), "--budget is 'soon'", "10m or 2h")
        assert_refused(cli(*words(tiny_net, photos), "--layer", "nowhere"), "nowhere")
        assert_refused(cli(*words(tiny_net, photos), "--report", "a.txt"), "--report 'a.txt' does not end in .html")
        assert_refused(cli("advise", "no_such_net", photos), "no model 'no_such_net'")
