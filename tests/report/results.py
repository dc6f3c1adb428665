"""Results of runs, and what a browser would see in their pages."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from regraft.report import write_report
from regraft.training.config import TrainConfig
from regraft.training.metrics import measure
from regraft.training.result import EpochRecord, FitResult, TrainPlan


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
        if self._tag not in ("style", "script"):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).replace("\N{NO-BREAK SPACE}", " ").split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.tags if found == tag]

    @property
    def photos(self) -> list[dict[str, str]]:
        """The pictures of photos, without their heat maps."""
        return [attributes for attributes in self.all("img") if attributes.get("class") != "heat"]


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
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    if page.all("html"):  # a page, and not a figure alone
        assert_runs_one_script(page)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                assert value.startswith(("#", "data:image/")), (name, value[:80])
    for target in re.findall(r"url\(([^)]*)\)", page.source):
        assert target.strip("'\"").startswith("#")


def assert_runs_one_script(page: Page) -> None:
    """Check that a page has no script but the one whose digest its security policy allows."""
    scripts = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    assert len(page.all("script")) == len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
