import base64
import io
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from regraft.data.decode import Unreadable
from regraft.errors import RunError
from regraft.report import plots, write_report
from regraft.report.html import render, write_page
from regraft.report.run_page import wilson_interval
from regraft.training.config import TrainConfig
from regraft.training.metrics import measure
from regraft.training.result import ComputedOnce, EpochRecord, FitResult, TrainPlan

HOSTILE = "<mark>'1'</mark>\" title=\"x\n&amp; ${x} {{ x }} $a^"


class Page(HTMLParser):
    """What a browser would see in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self._tag = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self._tag != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).replace("\N{NO-BREAK SPACE}", " ").split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.tags if found == tag]


def tiny_model(outputs: int) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU()))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model.append(nn.Linear(4, outputs))
    model[0].requires_grad_(False)
    return model.eval()


def plan(model: nn.Module, classes: tuple[str, ...] | None, count: int, **changes: object) -> TrainPlan:
    values = {
        "model": "tiny",
        "weights": "none",
        "task": "classification",
        "classes": classes,
        "counts": tuple((name, 10 + index, 3) for index, name in enumerate(classes or ())),
        "split": "as found in train/ and val/",
        "train_count": 2345,
        "validation_count": count,
        "unreadable": (),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "trained_layers": ("4",),
        "lr": 0.003,
        "device": "cpu fp32",
    }
    return TrainPlan(**{**values, **changes})  # type: ignore[arg-type]


def classified(classes: tuple[str, ...] | None, count: int = 60, size: int = 0, **changes: object) -> FitResult:
    generator = torch.Generator().manual_seed(0)
    size = size or len(classes or ())
    names = classes or tuple(map(str, range(size)))
    targets = torch.arange(count) % size
    outputs = torch.randn(count, size, generator=generator) + 2 * nn.functional.one_hot(targets, size)
    found = measure(outputs, targets, names)
    earlier = measure(outputs.roll(1, 0), targets, names)
    model = tiny_model(size)
    values = {
        "model": model,
        "plan": plan(model, classes, count),
        "config": TrainConfig(model="tiny", epochs=3, lr=0.003),
        "history": tuple(EpochRecord(e, 2.0 / e, m, 0.001, 1.5) for e, m in enumerate((earlier, found, found), 1)),
        "best_epoch": 2,
        "validation": found,
        "outputs": outputs,
        "targets": targets,
        "seconds": {"model": 0.5, "training": 61.0},
    }
    return FitResult(**{**values, **changes})  # type: ignore[arg-type]


def regressed(count: int = 50, **changes: object) -> FitResult:
    generator = torch.Generator().manual_seed(0)
    targets = torch.linspace(-3, 7, count)
    outputs = (targets + torch.randn(count, generator=generator)).unsqueeze(1)
    found = measure(outputs, targets, None)
    model = tiny_model(1)
    values = {
        "model": model,
        "plan": plan(model, None, count, task="regression"),
        "config": TrainConfig(epochs=1),
        "history": (EpochRecord(1, 0.5, found, 0.001, 1.5),),
        "best_epoch": 1,
        "validation": found,
        "outputs": outputs,
        "targets": targets,
    }
    return FitResult(**{**values, **changes})  # type: ignore[arg-type]


def photos(folder: Path, names: list[str]) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, name in enumerate(names):
        path = folder / name
        with path.open("wb") as file:
            Image.new("RGB", (300, 200), (index % 256, 90, 200)).save(file, "PNG")
        paths.append(path)
    return tuple(paths)


def written(result: FitResult, folder: Path) -> Page:
    return Page(write_report(result, folder / "report.html").read_text(encoding="utf-8"))


def assert_complete_in_itself(page: Page) -> None:
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                assert value.startswith(("#", "data:image/")), (name, value[:80])
    for target in re.findall(r"url\(([^)]*)\)", page.source):
        assert target.strip("'\"").startswith("#")


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(60)]
    page = written(classified(("ant", "bee", "wasp"), paths=photos(tmp_path / "photos", names)), tmp_path)
    assert_complete_in_itself(page)
    assert "default-src 'none'" in page.source
    anchors = {attributes["href"] for attributes in page.all("a")}
    references = {attributes["xlink:href"] for attributes in page.all("use")}
    assert anchors
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {target[1:] for target in anchors | references} <= ids


def test_figures_in_the_text_are_those_of_the_result(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (7, 7), (132, 153), (1, 1)])
def test_interval_agrees_with_scipy(correct: int, count: int) -> None:
    assert wilson_interval(correct, count) == pytest.approx(
        tuple(binomtest(correct, count).proportion_ci(method="wilson")), abs=1e-6
    )


def test_few_photos_are_called_few(tmp_path: Path) -> None:
    assert "interval is wide" in written(classified(("a", "b"), count=99), tmp_path).text
    assert "interval is wide" not in written(classified(("a", "b"), count=100), tmp_path).text


def test_most_confident_mistakes_come_first_and_upright(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    result = classified(("ant", "bee", "wasp"), paths=paths)
    probabilities = result.outputs.softmax(1)
    wrong = [i for i in range(60) if probabilities[i].argmax() != result.targets[i]]
    expected = sorted(wrong, key=lambda i: -probabilities[i].max().item())[:12]
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: the photo is wide, and shows something high
    Image.new("RGB", (300, 200)).save(paths[expected[0]], "JPEG", exif=turned)
    page = written(result, tmp_path)
    images = page.all("img")
    assert [attributes["alt"][:6] for attributes in images] == [paths[index].name for index in expected]
    sizes = []
    for attributes in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        assert picture.format == "JPEG"
        assert not picture.getexif()
        sizes.append(picture.size)
    assert sizes[0] == (107, 160)
    assert set(sizes[1:]) == {(160, 107)}


def test_vanished_and_broken_photos_are_tolerated(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", [f"{index:02}.png" for index in range(60)])
    result = classified(("ant", "bee", "wasp"), paths=paths)
    count = len(written(result, tmp_path).all("img"))
    for path in paths[::2]:
        path.write_bytes(b"\x89PNG")
    some = written(result, tmp_path)
    shutil.rmtree(tmp_path / "photos")
    none = written(result, tmp_path)
    assert count == len(some.all("img")) + some.text.count("the file is gone")
    assert none.text.count("the file is gone") == count > 0
    assert not none.all("img")


def test_hostile_names_are_inert(tmp_path: Path) -> None:
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


def test_datasets_that_are_no_files_have_no_pictures(tmp_path: Path) -> None:
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


def test_no_mistakes_are_no_error(tmp_path: Path) -> None:
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
    assert "every validation photo was predicted rightly" in page.text
    assert "no choice between epochs" in page.text


@pytest.mark.parametrize(("size", "numbered"), [(2, True), (25, True), (40, False)])
def test_confusion_has_numbers_up_to_25_classes(size: int, numbered: bool) -> None:
    counts = [[777 if row == column else 0 for column in range(size)] for row in range(size)]
    names = [f"class {index}" for index in range(size)]
    drawn = Page(plots.confusion(counts, names) or "")
    assert drawn.text.count("777") == (size if numbered else 0)
    assert all(drawn.text.count(name) >= 2 for name in names)


def test_many_classes(tmp_path: Path) -> None:
    classes = tuple(f"a rather long name of class {index}" for index in range(40))
    page = written(classified(classes, count=200), tmp_path)
    assert "numbers are left out" in page.text
    assert all(name in page.text for name in classes)
    assert plots.confusion([[1] * 121] * 121, ["x"] * 121) is None
    assert "too large to be drawn" in written(classified(None, size=121, count=121), tmp_path).text


def test_regression_page(tmp_path: Path) -> None:
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
    assert [attributes["alt"][:6] for attributes in page.all("img")] == [paths[index].name for index in worst]
    assert "onfusion" not in page.text
    assert "alibration" not in page.text


def test_regression_with_equal_targets(tmp_path: Path) -> None:
    outputs, targets = torch.ones(3, 1), torch.ones(3)
    found = measure(outputs, targets, None)
    result = regressed(3, outputs=outputs, targets=targets, validation=found)
    result = replace(result, history=(EpochRecord(1, 0.0, found, 0.1, 0.1),))
    assert "all targets are equal" in written(result, tmp_path).text


def test_layers_say_what_was_frozen_and_options_what_was_chosen(tmp_path: Path) -> None:
    page = written(classified(("a", "b")), tmp_path)
    assert "0 Conv2d 1×4×222×222 112 5,322,672 frozen" in page.text
    assert "4 Linear 1×2 10 8 trainable" in page.text
    assert {"frozen", "trainable", "partly frozen"} <= set(page.pieces)
    assert "All 9 layers" in page.text
    assert all(f" {name} " in page.text for name in TrainConfig.model_fields)


def test_every_table_head_has_a_scope_and_every_figure_a_label(tmp_path: Path) -> None:
    page = written(classified(("a", "b")), tmp_path)
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    figures = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(figures) == len(page.all("figure")) == 4
    assert all(attributes["aria-label"] for attributes in figures)


def test_failed_write_leaves_the_previous_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_page(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write the report '.*report\.html': No space left .* previous one is as"
    ):
        write_page(path, "after")
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_missing_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Check that its folder exists"):
        write_report(classified(("a", "b")), tmp_path / "missing" / "report.html")
    assert not list(tmp_path.iterdir())


def test_page_needs_every_variable() -> None:
    with pytest.raises(UndefinedError):
        render("run.html", result=None)


def test_sweep_draws_each_method_and_tick() -> None:
    series = {
        "linear probe": [(1.0, 0.5, 0.05), (10.0, 0.8, 0.02)],
        "<from> scratch": [(1.0, 0.2, 0.1), (10.0, 0.4, 0.1), (50.0, 0.6, 0.0)],
    }
    drawn = Page(plots.sweep(series, "photos per class", "accuracy"))
    assert_complete_in_itself(drawn)
    for text in ("linear probe", "<from> scratch", "photos per class", "accuracy", "1", "10", "50"):
        assert text in drawn.pieces
    assert Page(plots.sweep(series, "x", "y", log_x=False)).all("svg")


def test_drawing_is_repeatable_and_leaves_the_settings_alone() -> None:
    series = {"validation": [0.5, 0.7, 0.6]}
    matplotlib.rcParams["font.size"] = 23.0
    try:
        before = dict(matplotlib.rcParams)
        first, second = (plots.learning_curves(series, 2, "accuracy") for _ in range(2))
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams["font.size"] = matplotlib.rcParamsDefault["font.size"]
    assert first == second
    assert plots.learning_curves(series, 2, "accuracy") == first


def test_the_old_name_of_the_reason_is_readable_with_a_warning() -> None:
    result = classified(("ant", "bee"), cache_disabled_reason="nothing of it is constant")
    with pytest.warns(
        DeprecationWarning, match=r"FitResult\.not_once_because is deprecated\. Use cache_disabled_reason"
    ):
        assert result.not_once_because == "nothing of it is constant"
    data = result.to_dict()
    assert data["cache_disabled_reason"] == data["not_once_because"] == "nothing of it is constant"


def test_what_was_computed_once_is_said_with_what_it_saved(tmp_path: Path) -> None:
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
    assert "computed once" not in written(classified(("ant", "bee")), tmp_path).text
