"""`regraft check`."""

import csv
import shutil
from pathlib import Path

from photo_checks.pictures import copied, picture, save
from report.results import Page, assert_complete_in_itself
from scene import Cli, assert_refused, only_json


def photos_with_a_leak(root: Path) -> Path:
    for index, name in enumerate(("train/cats", "train/dogs", "val/cats", "val/dogs")):
        for number in range(10):
            save(picture(10 * index + number, (60, 45)), root / name / f"{number}.png")
    save(copied(picture(3, (60, 45))), root / "val/cats/<b>copy.jpg")
    return root


def test_cli_check_exits_with_1_and_writes_table_and_page_of_what_it_found(cli: Cli, tmp_path: Path) -> None:
    root = photos_with_a_leak(tmp_path / "pets")
    result = cli("check", root, "--no-labels", "--csv", "out.csv", "--report", "out.html")
    assert result.exit_code == 1, result.stderr
    assert "Training photos that validation has too: 1 (error)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["path"], row["other"]) == (str(root / "train/cats/3.png"), str(root / "val/cats/<b>copy.jpg"))
    assert (row["problem"], row["severity"]) == ("leak", "error")
    assert float(row["score"]) > 0.95
    page = Page(Path("out.html").read_text(encoding="utf-8"))
    assert_complete_in_itself(page)
    assert "nearly the same picture, mirrored, as <b>copy.jpg, in validation" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert "Not checked. Labels: not looked at, as was asked for." in page.text


def test_cli_check_exits_with_0_without_errors_or_if_told_to(cli: Cli, tmp_path: Path) -> None:
    root = photos_with_a_leak(tmp_path / "pets")
    assert cli("check", root, "--no-labels", "--exit-zero").exit_code == 0
    (root / "val/cats/<b>copy.jpg").unlink()
    shutil.rmtree(root / "val")
    result = cli("check", root / "train", "--no-labels", "--json")
    assert result.exit_code == 0, result.stdout
    answer = only_json(result.stdout)
    assert answer["problems"] == {"few": 2}
    assert answer["photos"] == {"train": 16, "validation": 4}
    assert answer["unchecked"] == ["Labels: not looked at, as was asked for."]


def test_cli_check_refuses_what_it_cannot_look_at(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("check", "gone"), "no folder 'gone'", "Give the folder that holds your photos")
    Path("out.csv").touch()
    assert_refused(cli("check", tmp_path, "--csv", "out.csv"), "'out.csv' exists", "pass --overwrite")
    assert_refused(cli("check", tmp_path, "--report", "out.txt"), "--report 'out.txt' does not end in .html")
    assert_refused(cli("check", tmp_path, "--csv", "a/b.csv"), "no folder 'a' to write 'b.csv' into")
    assert_refused(cli("check", tmp_path, "--seed", "-1"), "--seed")
