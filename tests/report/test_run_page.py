"""The page of a run, read as a browser would."""

import base64
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from regraft.data.decoding.files import Unreadable
from regraft.errors import ArgumentError, RunError
from regraft.report import plots, write_report
from regraft.training.config import TrainConfig
from regraft.training.metrics import Scores, measure
from regraft.training.result import ComputedOnce, EpochRecord
from report.results import Page, assert_complete_in_itself, classified, photos, regressed, written

HOSTILE = "<mark>'1'</mark>\" title=\"x\n&amp; ${x} {{ x }} $a^"


def test_write_report_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(60)]
    page = written(classified(("ant", "bee", "wasp"), paths=photos(tmp_path / "photos", names)), tmp_path)
    assert_complete_in_itself(page)
    assert "default-src 'none'" in page.source
    anchors = {attributes["href"] for attributes in page.all("a")}
    references = {attributes["xlink:href"] for attributes in page.all("use")}
    assert anchors
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {target[1:] for target in anchors | references} <= ids


def test_write_report_states_the_figures_of_the_result(tmp_path: Path) -> None:
    result = classified(("ant", "bee", "wasp"), checkpoint=tmp_path / "my run" / "model.safetensors")
    metrics = result.validation
    assert metrics.accuracy is not None
    page = written(result, tmp_path)
    assert f"Validation accuracy {100 * metrics.accuracy:.1f} %" in page.text
    assert f"{sum(row[k] for k, row in enumerate(metrics.confusion))} of 60 examples" in page.text
    low, high = binomtest(round(metrics.accuracy * 60), 60).proportion_ci(method="wilson")
    assert f"{100 * low:.1f}–{100 * high:.1f} %" in page.text
    assert "2 of 3" in page.text
    assert "slightly optimistic" in page.text
    assert f"calibration error: {metrics.calibration_error:.3f}" in page.text
    for found in metrics.per_class:
        assert f"{found.name} {found.precision:.3f} {found.recall:.3f} {found.f1:.3f} {found.count}" in page.text
    assert f"regraft predict '{tmp_path}/my run/model.safetensors' photo.jpg" in page.text
    assert "2,345 examples to learn from, 60 for validation" in page.text
    assert "bee 11 3" in page.text
    assert "training 1 min 1 s" in page.text
    assert f"torch {torch.__version__.partition('+')[0]}" in page.text


def test_write_report_calls_few_photos_few(tmp_path: Path) -> None:
    assert "interval is wide" in written(classified(("a", "b"), count=99), tmp_path).text
    assert "interval is wide" not in written(classified(("a", "b"), count=100), tmp_path).text


def test_write_report_shows_the_most_confident_mistakes_first_and_upright(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    result = classified(("ant", "bee", "wasp"), paths=paths)
    probabilities = result.outputs.softmax(1)
    wrong = [i for i in range(60) if probabilities[i].argmax() != result.targets[i]]
    expected = sorted(wrong, key=lambda i: -probabilities[i].max().item())[:12]
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: the photo is wide, and shows something high
    Image.new("RGB", (300, 200)).save(paths[expected[0]], "JPEG", exif=turned)
    page = written(result, tmp_path)
    images = page.photos[: len(expected)]
    assert [attributes["alt"][:6] for attributes in images] == [paths[index].name for index in expected]
    sizes = []
    for attributes in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        assert picture.format == "JPEG"
        assert not picture.getexif()
        sizes.append(picture.size)
    assert sizes[0] == (107, 160)
    assert set(sizes[1:]) == {(160, 107)}


def test_write_report_shows_where_the_network_looked_in_its_mistakes(tmp_path: Path) -> None:
    result = classified(("ant", "bee"), paths=photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)]))
    mistakes = sum(result.outputs.argmax(1) != result.targets)
    page = written(result, tmp_path)
    heat = [attributes for attributes in page.all("img") if attributes.get("class") == "heat"]
    assert 0 < len(heat) <= min(mistakes, 12)
    assert all(
        attributes["alt"].startswith(("What spoke for ant: mostly", "What spoke for bee: mostly"))
        for attributes in heat
    )
    assert "Grad-CAM" in page.text
    without = Page(write_report(result, tmp_path / "without.html", heat_maps=False).read_text())
    assert len(without.photos) == len(without.all("img")) == len(page.photos)
    broken = written(replace(result, model=nn.Sequential(*result.model, nn.Linear(9, 9))), tmp_path)
    assert re.search("Where it looked is not shown: .*shapes cannot be multiplied", broken.text)


def test_write_report_tolerates_vanished_and_broken_photos(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    result = classified(("ant", "bee", "wasp"), paths=paths)
    count = len(written(result, tmp_path).photos)
    for path in paths[::2]:
        path.write_bytes(b"\x89PNG")
    some = written(result, tmp_path)
    shutil.rmtree(tmp_path / "photos")
    none = written(result, tmp_path)
    assert count == len(some.photos) + some.text.count("the file is gone")
    assert none.text.count("the file is gone") == count > 0
    assert not none.all("img")


def test_write_report_makes_hostile_names_inert(tmp_path: Path) -> None:
    hostile_file = os.fsdecode(b"<u title=x>'\"\n\xff.png")
    names = [hostile_file if index == 0 else f"{index}{hostile_file}" for index in range(40)]
    classes = (HOSTILE, "\udcff\x00 \N{RIGHT-TO-LEFT OVERRIDE}", "日本 ü", "$\\frac{")
    result = classified(classes, count=40, paths=photos(tmp_path / "photos", names))
    hostile_plan = replace(
        result.plan, model=HOSTILE, split=HOSTILE, unreadable=(Unreadable(Path("d") / hostile_file, HOSTILE),)
    )
    config = result.config.updated(data=f"/x/{HOSTILE}")
    page = written(replace(result, plan=hostile_plan, config=config), tmp_path)
    assert_complete_in_itself(page)
    shown = HOSTILE.replace("\n", "\\n")
    assert "<mark" not in page.source
    assert "<u title" not in page.source
    assert page.text.count(shown) >= 6
    assert "\\xff\\x00 \\u202e" in page.text
    assert "日本 ü" in page.text
    assert page.text.count("<u title=x>'\"\\n\\xff.png") >= 1
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in page.all("img"))


def test_write_report_has_no_pictures_of_datasets_that_are_no_files(tmp_path: Path) -> None:
    result = classified(None, size=5)
    unknown = replace(result.plan, counts=(), train_count=None)
    page = written(replace(result, plan=unknown), tmp_path)
    assert "No pictures" in page.text
    assert "An unknown number of examples to learn from, 60 for" in page.text
    assert not page.all("img")
    assert all(
        f" {index} {found.precision:.3f} " in page.text for index, found in enumerate(result.validation.per_class)
    )
    assert "The model was not saved" in page.text


def test_write_report_without_mistakes(tmp_path: Path) -> None:
    targets = torch.arange(6) % 2
    outputs = 9 * nn.functional.one_hot(targets, 2).float()
    found = measure(outputs, targets, ("a", "b"))
    result = replace(
        classified(("a", "b"), count=6, paths=photos(tmp_path / "p", [f"{i}.png" for i in range(6)])),
        outputs=outputs,
        targets=targets,
        validation=found,
        history=(EpochRecord(1, 0.1, found, 0.1, 0.1),),
        best_epoch=1,
    )
    page = written(result, tmp_path)
    assert "Most confident mistakes None." in page.text
    assert "no choice between epochs" in page.text


def test_write_report_of_many_classes(tmp_path: Path) -> None:
    classes = tuple(f"a rather long name of class {index}" for index in range(40))
    page = written(classified(classes, count=200), tmp_path)
    assert "numbers are left out" in page.text
    assert all(name in page.text for name in classes)
    assert plots.confusion([[1] * 121] * 121, ["x"] * 121) is None
    assert "too large to be drawn" in written(classified(None, size=121, count=121), tmp_path).text


def test_write_report_of_a_regression(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(50)])
    result = regressed(paths=paths)
    metrics = result.validation
    page = written(result, tmp_path)
    assert_complete_in_itself(page)
    assert metrics.r2 is not None
    for figure in (f"{metrics.mae:.4g}", f"{metrics.rmse:.4g}", f"{metrics.r2:.3f}"):
        assert figure in page.text
    errors = (result.outputs.flatten() - result.targets).abs()
    worst = sorted(range(50), key=lambda index: -errors[index].item())[:12]
    assert [attributes["alt"][:6] for attributes in page.photos[:12]] == [paths[index].name for index in worst]
    assert "onfusion" not in page.text
    assert "alibration" not in page.text


def test_write_report_of_a_regression_with_equal_targets(tmp_path: Path) -> None:
    outputs, targets = torch.ones(3, 1), torch.ones(3)
    found = measure(outputs, targets, None)
    result = regressed(3, outputs=outputs, targets=targets, validation=found)
    result = replace(result, history=(EpochRecord(1, 0.0, found, 0.1, 0.1),))
    assert "all targets are equal" in written(result, tmp_path).text


def test_write_report_shows_the_least_and_the_most_confident_right_predictions(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    result = classified(("ant", "bee", "wasp"), paths=paths)
    confidence, predicted = result.outputs.softmax(1).max(1)
    right = sorted((i for i in range(60) if predicted[i] == result.targets[i]), key=lambda i: confidence[i].item())
    page = written(result, tmp_path)
    shown = [attributes["alt"].partition(":")[0] for attributes in page.all("img")]
    assert shown[-12:-6] == [paths[index].name for index in right[:6]]
    surest = [index for index in reversed(right) if index in right[-20:]]
    of_each = [[index for index in surest if predicted[index] == k][:2] for k in range(3)]
    assert set(shown[-6:]) == {paths[index].name for indices in of_each for index in indices}


def test_write_report_of_an_evaluation(tmp_path: Path) -> None:
    result = classified(("ant", "bee"))
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    scores = Scores(result.outputs, result.targets, paths, model="tiny", seconds={"reading": 70.0})
    metrics = replace(result.validation, scores=scores)
    page = Page(write_report(metrics, tmp_path / "e.html").read_text())
    assert_complete_in_itself(page)
    assert not [attributes for attributes in page.all("img") if attributes.get("class") == "heat"]
    seen = Page(write_report(metrics, tmp_path / "e.html", model=result.model).read_text())
    assert "What spoke for" in seen.source
    assert "Learning" not in page.text
    assert f"Accuracy {100 * (metrics.accuracy or 0):.1f} %" in page.text
    assert "reading 1 min 10 s" in page.text
    assert len(page.all("img")) > 12
    with pytest.raises(ArgumentError, match=r"Metrics without scores.* Pass what `fit` or `evaluate` returned"):
        write_report(result.validation, tmp_path / "e.html")


def test_write_report_says_that_a_run_was_stopped_and_how_to_go_on(tmp_path: Path, plain: Page) -> None:
    stopped = classified(("a", "b"), stopped_by="Ctrl-C", to_continue="regraft train --resume 'my run'")
    text = written(stopped, tmp_path).text
    assert "This run was stopped after 3 of 3 epochs, by Ctrl-C." in text
    assert "To continue: regraft train --resume 'my run'" in text
    assert "stopped" not in plain.text


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Return the page of a run with two classes and nothing else to say; tests only read it."""
    return written(classified(("a", "b")), tmp_path_factory.mktemp("plain"))


def test_write_report_says_what_was_frozen_and_which_options_were_chosen(plain: Page) -> None:
    assert "0 Conv2d 1×4×222×222 112 5,322,672 frozen" in plain.text
    assert "4 Linear 1×2 10 8 trainable" in plain.text
    assert {"frozen", "trainable", "partly frozen"} <= set(plain.pieces)
    assert "All 9 layers" in plain.text
    assert all(f" {name} " in plain.text for name in TrainConfig.model_fields)


def test_write_report_gives_every_table_head_a_scope_and_every_figure_a_label(plain: Page) -> None:
    assert all(attributes.get("scope") in ("col", "row") for attributes in plain.all("th"))
    figures = [attributes for attributes in plain.all("div") if attributes.get("role") == "img"]
    assert len(figures) == len(plain.all("figure")) == 4
    assert all(attributes["aria-label"] for attributes in figures)


def test_write_report_says_that_a_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Check that its folder exists"):
        write_report(classified(("a", "b")), tmp_path / "missing" / "report.html")
    assert not list(tmp_path.iterdir())


def test_write_report_says_what_was_computed_once_and_what_it_saved(tmp_path: Path, plain: Page) -> None:
    once = ComputedOnce(
        frontier=(("'layer3.0'", (256, 14, 14)), ("'layer3.1'", (9,))),
        share=0.625,
        views=2,
        bytes=5 * 2**20,
        where="in memory",
        was_found=False,
        seconds=4.0,
        saved_s=96.0,
        note="cut earlier",
    )
    text = written(classified(("ant", "bee"), computed_once=once), tmp_path).text
    for part in ("62.5 %", "4.00 s", "5.0 MiB", "≈ 1 min 36 s", "in each of 3 epochs", "2 versions of each photo"):
        assert part in text, part
    assert "'layer3.0' (256 × 14 × 14), 'layer3.1' (9)" in text
    assert "cut earlier" in text
    text = written(classified(("ant", "bee"), cache_disabled_reason="nothing of it is constant"), tmp_path).text
    assert "Nothing; every epoch ran the full network: nothing of it is constant." in text
    assert "computed once" not in plain.text


def test_fit_result_keeps_the_old_name_of_the_reason_with_a_warning() -> None:
    result = classified(("ant", "bee"), cache_disabled_reason="nothing of it is constant")
    with pytest.warns(
        DeprecationWarning, match=r"FitResult\.not_once_because is deprecated\. Use cache_disabled_reason"
    ):
        assert result.not_once_because == "nothing of it is constant"
    data = result.to_dict()
    assert data["cache_disabled_reason"] == data["not_once_because"] == "nothing of it is constant"
