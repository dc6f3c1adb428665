"""Every Python sample of the README and of `docs/` runs, page by page, in a folder with a few photos."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in page.read_text()
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("server_answers")
def test_docs_samples_all_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "photos", ("cats", "dogs"), 6)
    write_photos(tmp_path, ("new_photos",), 2)
    monkeypatch.chdir(tmp_path)
    fresh = models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: fresh)
    for sample in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        with torch.random.fork_rng(devices=[]):
            exec(compile(sample, page.name, "exec"), {})


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_docs_links_all_lead_to_a_file(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_docs_architecture_names_files_and_rooms_that_exist() -> None:
    source = ROOT / "src/regraft"
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"\b[a-z_]+(?:/[a-z_]+)*(?:\.py|\.html|/)(?=\W)", text))
    tests = {"tests/test_layering.py", "tests/test_start.py", "tests/report/test_browser.py"}
    inner = {f"{folder.relative_to(source)}/" for folder in source.rglob("*") if (folder / "__init__.py").exists()}
    assert inner <= named
    for name in named - tests - {"benchmarks/start.py"}:
        places = [
            source / name,
            *(source / room / name for room in ("checkpoint", "checkpoint/file", "report/templates")),
        ]
        assert any(place.exists() for place in places) or name in ("photos/train/", "cat/", "photos/"), name


def test_docs_security_page_names_tests_that_exist() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert f"def {test}(" in (ROOT / file).read_text() if test else True, f"{file}::{test}"


def write_photos(folder: Path, classes: tuple[str, ...], count: int) -> None:
    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 128, (48, 64, 3), dtype=np.uint8) + 100 * index
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
