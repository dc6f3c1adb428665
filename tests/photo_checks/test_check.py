import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import regraft
from photo_checks.pictures import copied, picture, save
from regraft.errors import DataError, ModelError


def folder_of(root: Path, *names: str, count: int = 2) -> Path:
    """Write pictures into folders such as `train/cats`."""
    for number, name in enumerate(names):
        for index in range(count):
            save(picture(100 * number + index, (60, 45)), root / name / f"{index}.png")
    return root


def problems(root: Path, **options: object) -> dict[str, list[str]]:
    """Return the details of the findings by problem, without looking at labels."""
    report = regraft.check(root, labels=False, progress=False, **options)
    grouped: dict[str, list[str]] = {}
    for finding in report.findings:
        grouped.setdefault(finding.problem, []).append(finding.detail)
        assert finding.suggestion
    return {name: details for name, details in grouped.items() if name != "few"}


def test_check_of_good_photos_finds_nothing(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cats", "train/dogs", "val/cats", "val/dogs", count=10)
    report = regraft.check(root, labels=False, progress=False)
    assert (report.findings, report.errors) == ((), 0)
    assert report.counts == (("cats", 10, 10), ("dogs", 10, 10))
    assert "problems   none found" in str(report)
    assert "Labels: not looked at, as was asked for." in str(report)


def test_check_finds_copies_across_parts_and_classes_and_odd_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cats", "train/dogs", "val/cats", "val/dogs", count=4)
    save(copied(Image.open(root / "train/cats/0.png")), root / "val/cats/copy.jpg")
    shutil.copy(root / "train/cats/1.png", root / "train/dogs/same.png")
    shutil.copy(root / "val/dogs/3.png", root / "val/dogs/again.png")
    save(Image.new("RGB", (50, 50), "red"), root / "train/cats/red.png")
    save(picture(7, (20, 90)), root / "train/cats/tall.png")
    (root / "train/cats/notes.txt").write_text("sit")
    (root / "train/cats/cut.jpg").write_bytes((root / "val/cats/copy.jpg").read_bytes()[:500])
    report = regraft.check(root, labels=False, progress=False)
    found = {(finding.problem, finding.severity, Path(str(finding.path)).name) for finding in report.findings}
    assert {entry for entry in found if entry[0] != "few"} == {
        ("leak", "error", "0.png"),
        ("conflict", "error", "same.png"),
        ("duplicate", "warning", "same.png"),
        ("duplicate", "warning", "again.png"),
        ("blank", "warning", "red.png"),
        ("tiny", "warning", "tall.png"),
        ("aspect", "warning", "tall.png"),
        ("damaged", "warning", "cut.jpg"),
        ("not-a-photo", "warning", "notes.txt"),
    }
    assert max(map(len, str(report).splitlines())) <= 80
    rows = list(report.rows())
    assert rows[0] == ("path", "problem", "severity", "detail", "suggestion", "score", "other")
    assert len(rows) == 1 + len(report.findings)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("seg_train/seg_train/sea", "seg_train/seg_train/wood", "seg_test/seg_test/sea", "seg_test/seg_test/wood"),
            r"'seg_test/', 'seg_train/' would be the classes, but look like parts of the data. "
            r"'seg_train/seg_train/' holds 'sea/', 'wood/'",
        ),
        (("photos/cats", "photos/dogs"), "holds one folder only, 'photos/', which holds folders: that is one too many"),
        (("cats/train", "cats/val", "dogs/train", "dogs/val"), "Each class holds the parts, as 'cats/train/'"),
        (
            ("pets/cats", "pets/dogs", "wild/lynx", "wild/wolf"),
            "No class has photos of its own, only folders of photos",
        ),
        (("Cat", "cat", "dog"), "'Cat' and 'cat' are two classes, and probably one is meant"),
        (("train/cats", "train/dogs", "val/cats"), "The class 'dogs' is in 'train/' only"),
        (("train/cats", "val/cats", "val/dogs", "train/ape", "val/ape"), "The class 'dogs' is in 'val/' only"),
        (("cats",), "Training would refuse it: .* has one class only"),
        (("train/a", "train/b", "test/a", "test/b"), "'test/' is not used"),
    ],
)
def test_check_names_folders_that_were_meant_otherwise(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    details = problems(folder_of(tmp_path, *folders))["layout"]
    assert any(re.search(message, detail) for detail in details), details


def test_check_names_swapped_parts_empty_classes_and_loose_files(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cats", "train/dogs", "val/cats", "val/dogs")
    folder_of(root, "val/cats", "val/dogs", count=5)
    (root / "train/apes").mkdir()
    save(picture(9), root / "train/loose.png")
    details = "\n".join(problems(root)["layout"])
    assert "'val/' has 10 photos and 'train/' 4: they may be swapped." in details
    assert "The class 'apes' in 'train/' has no photos." in details
    assert "1 files lie beside the classes, as 'loose.png', and are not used." in details


def test_check_of_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    (detail,) = problems(tmp_path)["layout"]
    assert "has nothing in it. Expected a folder of photos for each class." in detail
    report = regraft.check(tmp_path, progress=False)
    assert report.unchecked == ("Labels: not looked at: there are no two classes to tell apart.",)


def test_check_of_a_table_says_that_numbers_are_not_compared(tmp_path: Path) -> None:
    folder_of(tmp_path, "photos", count=4)
    save(copied(Image.open(tmp_path / "photos/0.png")), tmp_path / "photos/copy.png")
    lines = [f"photos/{name}.png,{value}" for value, name in enumerate(("0", "1", "2", "3", "copy", "gone"))]
    table = tmp_path / "ages.csv"
    splits = ["train"] * 4 + ["val"] * 2
    rows = [f"{line},{split}" for line, split in zip(lines, splits, strict=True)]
    table.write_text("\n".join(["path,target,split", *rows]))
    report = regraft.check(table, progress=False)
    assert [finding.problem for finding in report.findings] == ["leak", "damaged"]
    assert report.findings[1].detail == "no such file"
    assert "the targets are numbers" in report.unchecked[0]


def test_check_of_shards_looks_into_them(tmp_path: Path) -> None:
    import tarfile

    for part in ("train", "val"):
        folder = folder_of(tmp_path / part, "cats", "dogs", count=3) if part == "train" else tmp_path / "train"
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as shard:
            for photo in sorted(folder.rglob("*.png")):
                key = f"{photo.parent.name}{photo.stem}"
                (label := tmp_path / "label").write_text(photo.parent.name)
                shard.add(photo, f"{key}.png")
                shard.add(label, f"{key}.cls")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "label").unlink()
    assert [len(details) for name, details in problems(tmp_path).items() if name == "leak"] == [6]


def test_check_refuses_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder '.*gone'"):
        regraft.check(tmp_path / "gone", progress=False)
    with pytest.raises(DataError, match=r"data is a list, expected a folder, shards, a .csv table, or datasets"):
        regraft.check([1, 2], progress=False)


def test_check_downloads_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    root = folder_of(tmp_path / "photos", "cats", "dogs", count=4)
    (reason,) = regraft.check(root, progress=False).unchecked
    assert reason.startswith(
        "Labels: the weights of 'resnet18' are not on this machine, and a check downloads nothing."
    )
    with pytest.raises(ModelError, match=r"a check downloads nothing. Train once, or pass model= with a network"):
        regraft.check(root, model="resnet34", progress=False)


@pytest.mark.slow
def test_check_finds_flipped_labels_with_a_network(shared: Path, tmp_path: Path) -> None:
    for part, first in (("train", 0), ("val", 20)):
        for name in ("bike", "car"):
            for photo in sorted((shared / f"data/car_vs_bike/{part}/{name}").iterdir())[first : first + 20]:
                shutil.copy(photo, save(picture(0), tmp_path / part / name / photo.name))
    wrong = {"train": ("bike", "car"), "val": ("car", "bike")}
    moved = set()
    for part, (label, other) in wrong.items():
        for photo in sorted((tmp_path / part / label).iterdir())[:3]:
            moved.add(photo.rename(tmp_path / part / other / photo.name))
    mobilenet = f"py:{Path(__file__).parents[2] / 'examples/mobilenet_v1.py'}:MobileNetV1"
    weights = shared / "weights/mobilenetV1X0.25_pretrain.tar"
    report = regraft.check(tmp_path, model=mobilenet, weights=str(weights), trust_code=True, progress=False)
    suspects = [finding.path for finding in report.findings if finding.problem == "label"]
    assert len(set(suspects[:6]) & moved) >= 5
    assert "had not learned from the photo" in report.notes[0]
