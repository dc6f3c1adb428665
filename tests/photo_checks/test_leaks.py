import shutil
from pathlib import Path

from photo_checks.pictures import picture, save
from scene import Fit, Recorder


def test_leaks_into_validation_are_said_while_training(fit: Fit, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for index, name in enumerate(("train/cats", "train/dogs", "val/cats", "val/dogs")):
        for number in range(6):
            save(picture(10 * index + number, (60, 45)), root / name / f"{number}.png")
    heard = Recorder()
    fit(root, progress=heard, freeze=["conv", "norm"])
    assert not [line for line in heard.lines if line.startswith("warning")]
    shutil.copy(root / "train/cats/2.png", root / "val/cats/same.png")
    fit(root, progress=heard, freeze=["conv", "norm"])
    (line,) = [line for line in heard.lines if line.startswith("warning")]
    assert line == (
        f"warning    1 of the photos held back are in training too, as '{root}/val/cats/same.png' = "
        f"'{root}/train/cats/2.png': the accuracy is too high. `regraft check` lists all"
    )
