"""`compare`: what its runs are, that it repeats nothing, and what it says of bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import regraft
from regraft.errors import ArgumentError, ConfigError, DataError, Interrupted, LossError
from regraft.trials import comparing
from regraft.trials.running import run_cell
from scene import Recorder, write_folder, write_photo
from trials.conftest import Compare


def test_compare_measures_the_last_epoch_of_runs_that_fit_would_do(
    compare: Compare, learned: tuple[str, Path, Path], tmp_path: Path
) -> None:
    name, weights, photos = learned
    ways = ["scratch", "probe", "lp-ft", "gradual", "all"]
    result = compare(ways=ways, images=["all"], out=tmp_path / "out", epochs=13)
    assert [cell.cell.way for cell in result.cells] == ways
    alone_options: list[dict[str, Any]] = [{"weights": "none", "augment": "standard"}, {"weights": str(weights)}]
    for cell, options in zip(result.cells, alone_options, strict=False):
        epochs = cell.stages[0]["epochs"]
        alone = regraft.fit(
            name, photos, **options, epochs=epochs, batch_size=4, keep_epoch="last", trust_code=True, progress=False
        )
        assert alone.best_epoch == alone.history[-1].epoch
        assert cell.loss == pytest.approx(alone.validation.loss, rel=1e-5)
        right = (alone.outputs.argmax(1) == alone.targets).int().tolist()
        assert cell.right == "".join(map(str, right))
        assert cell.accuracy == alone.validation.accuracy == sum(right) / 6
    for cell in result.cells:
        seconds, accuracies = zip(*cell.curve, strict=True)
        assert list(seconds) == sorted(seconds)
        assert seconds[-1] == pytest.approx(cell.total_s)
        assert accuracies[-1] == cell.accuracy
        assert len(seconds) <= 12 * len(cell.stages) + 1
    table = (tmp_path / "out/comparison.csv").read_text().splitlines()
    assert [row.split(",")[:4] for row in table[1:]] == [[way, "all", "8", "0"] for way in ways]
    assert json.loads((tmp_path / "out/comparison.json").read_text())["validation_count"] == 6


def test_compare_goes_on_where_it_was_stopped_and_repeats_nothing(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def counted(bench: Any, cell: Any, stages: Any) -> Any:
        if len(run) == 3:
            run.append("stopped")
            raise KeyboardInterrupt
        run.append(cell.name)
        return run_cell(bench, cell, stages)

    monkeypatch.setattr(comparing, "run_cell", counted)
    out, lines = tmp_path / "out", Recorder()
    with pytest.raises(Interrupted, match=r"stopped by Ctrl-C. 3 of 4 runs are complete, and kept in .*out"):
        compare(out=out)
    (out / "cells/probe-2-0.json").write_text("{")  # as after a power cut
    first = compare(out=out, progress=lines)
    assert run == ["scratch-2-0", "probe-2-0", "scratch-all-0", "stopped", "probe-2-0", "probe-all-0"]
    assert "continued  2 of 4 runs were complete" in lines.lines
    assert compare(out=out).cells == first.cells  # and runs nothing
    more = compare(out=out, images=[1, 2, "all"])
    assert run[6:] == ["scratch-1-0", "probe-1-0"]
    assert more.cells[2:] == first.cells


def test_compare_refuses_a_folder_with_other_results(compare: Compare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(out=out, images=[1], ways=["probe"])
    with pytest.raises(ConfigError, match=r"another comparison: 'epochs' was 3 and is 4. Choose another folder \("):
        compare(out=out, epochs=4)
    assert compare(out=out, images=[1], ways=["probe"], epochs=4, overwrite=True).epochs == 4
    write_photo(tmp_path / "other/mine.png")
    with pytest.raises(ConfigError, match=r"other' exists and holds no comparison. Choose another folder \(out=FOLDER"):
        compare(out=tmp_path / "other")


def test_compare_has_only_scratch_for_a_network_without_weights(compare: Compare) -> None:
    result = compare(weights="none", images=[2])
    assert [way.name for way in result.ways] == ["scratch"]
    ((what, why),) = result.left_out
    assert what == "linear probe"
    assert "TinyNet has no pretrained weights, so there is nothing to transfer. Pass weights=FILE." in why
    assert result.claims == result.headlines == ()
    with pytest.raises(ConfigError, match=r"nothing to compare: .* has no pretrained weights.*Add the way 'scratch'"):
        compare(weights="none", ways=["probe"])


def test_compare_measures_the_images_that_there_are(compare: Compare, learned: tuple[str, Path, Path]) -> None:
    result = compare(images=[1, 4, 5, "all"], ways=["probe"])
    assert result.images == ("1", "all")
    assert [cell.count for cell in result.cells] == [2, 8]
    assert dict(result.left_out)["images"].startswith("4 images a class are all images")
    assert ("images", "5 images a class were left out: 'cats' has 4 training photos.") in result.left_out
    with pytest.raises(DataError, match=r"images asks for 5 images a class or more, and 'cats' has 4 training photos"):
        compare(images=[5, 9])


def test_compare_splits_a_folder_as_train_does_and_needs_two_classes(compare: Compare, tmp_path: Path) -> None:
    write_folder(tmp_path / "one", classes=("cats",))
    with pytest.raises(DataError, match="has one class only"):
        compare(tmp_path / "one")
    photos = write_folder(tmp_path / "photos", count=2)
    result = compare(photos, images=["all"], ways=["probe"])
    assert (result.train_count, result.validation_count) == (2, 2)  # one image of each class
    for part, classes in (("train", ("cats", "dogs")), ("val", ("cats", "dogs", "eels"))):
        write_folder(tmp_path / "parts" / part, classes=classes)
    with pytest.raises(DataError, match=r"the classes differ: .*'eels'"):
        compare(tmp_path / "parts")


def test_compare_leaves_a_way_out_whose_loss_is_not_finite(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(bench: Any, cell: Any, stages: Any) -> Any:
        if cell.way == "scratch":
            raise LossError("epoch 1: the loss is nan.")
        return run_cell(bench, cell, stages)

    monkeypatch.setattr(comparing, "run_cell", failing)
    result = compare()
    assert [way.name for way in result.ways] == ["probe"]
    assert ("from scratch", "stopped with 2 images a class: epoch 1: the loss is nan.") in result.left_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, r"lr is not for a comparison, whose ways differ in it. Leave it out, or choose .* ways=NAMES"),
        ({"epochs": 2}, r"epochs=2 is too few to compare. Pass 3 or more"),
        ({"images": [0]}, r"images has 0, expected numbers from 1, or 'all'"),
        ({"images": []}, r"images is empty, expected numbers of images per class"),
        ({"ways": []}, r"ways is empty, expected some of scratch, probe"),
        ({"seeds": 0}, r"compare: seeds is 0, expected at least 1"),
        ({"data": [1, 2]}, r"compare: data is a list, expected a folder of photos, shards, or datasets"),
    ],
)
def test_compare_refuses_options_that_cannot_work(compare: Compare, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ArgumentError), match=message):
        compare(**options)


def test_compare_refuses_a_table_of_numbers(compare: Compare, learned: tuple[str, Path, Path], tmp_path: Path) -> None:
    photo = shutil.copy(next((learned[2] / "train/cats").iterdir()), tmp_path / "photo.png")
    rows = "\n".join(f"{photo},{number}" for number in range(4))
    (tmp_path / "table.csv").write_text(f"path,target\n{rows}\n")
    with pytest.raises(ConfigError, match="a table of numbers has no classes to draw images of"):
        compare(tmp_path / "table.csv")
