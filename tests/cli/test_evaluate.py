"""`regraft evaluate`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import regraft
from checkpoint.altered import changed
from hostile.bad_folders import a_file, empty, missing
from hostile.crafted import document, write_with
from regraft import save
from regraft.card import Preprocessing, attach
from regraft.cli.app import app
from regraft.errors import CheckpointError, TrustError
from report.results import Page, assert_complete_in_itself
from scene import Cli, assert_refused, nothing_written, only_json, write_folder, write_photo


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ("no folder '", "bad' (looked from ", "Give the folder that holds your photos")),
        (empty, ("no photos in '", "bad'", "Expected a folder for each of 'cats', 'dogs'")),
        (a_file, ("bad' is a file", "expected a folder")),
        (
            lambda root: write_folder(root, ("cats", "emus", "yaks")),
            ("bad' has folders that are not classes of the model: 'emus', 'yaks'", "The model has 'cats', 'dogs'"),
        ),
        (lambda root: (root / "cats").mkdir(parents=True), ("no photos in '", "bad'")),
        (
            lambda root: write_photo(root / "cats" / "1.png").write_text("no photo"),
            ("none of 1 files can be read as a photo", "1.png', for instance, not an image"),
        ),
    ],
    ids=["missing", "empty", "a file", "unknown classes", "an empty class", "nothing readable"],
)
def test_cli_evaluate_refuses_a_bad_folder(
    make: Callable[[Path], object], parts: tuple[str, ...], workplace: Path, cli: Cli, saved: Path
) -> None:
    make(workplace / "bad")
    with nothing_written():
        assert_refused(cli("evaluate", saved, workplace / "bad", "--trust-code"), *parts)


def flip_last_byte(saved: Path, target: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-1] ^= 1
    target.write_bytes(raw)


NO_FILE = ("no file '", "bad.safetensors' (looked from ", "Give the path of a checkpoint")
CUT_OFF = ("bad.safetensors' is no safetensors file, or it is cut off (", "Expected a file written by `regraft train`")
NO_RECIPE = ("bad.safetensors' has tensors but no recipe, so its architecture is unknown",)
TORCH_FILE = ("bad.safetensors' is a file of torch.save: weights without an architecture", "--weights FILE")
DAMAGED = ("bad.safetensors' is damaged: ", "Get or make it again")
BAD_HEADER = ("bad.safetensors' has a header that does not fit the format 1.0: ", "Get or make the file again")
NEWER = ("bad.safetensors' has the format 2.0; this version reads 1.0", "Install a newer regraft")

BAD: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "missing": (lambda saved, bad: None, NO_FILE),
    "a folder": (
        lambda saved, bad: bad.mkdir(),
        ("no checkpoint in the folder", "bad.safetensors': it holds no file of weights"),
    ),
    "empty": (
        lambda saved, bad: bad.write_bytes(b""),
        ("bad.safetensors' cannot be read as weights: it is empty (0 bytes)", "get it again"),
    ),
    "text": (
        lambda saved, bad: bad.write_text("this is no checkpoint, but a letter to a friend"),
        ("bad.safetensors' cannot be read as weights: it is text, which begins 'this is no", "Expected safetensors"),
    ),
    "pickled": (lambda saved, bad: torch.save({"fc.weight": torch.ones(2)}, bad), TORCH_FILE),
    "cut off in the header": (lambda saved, bad: bad.write_bytes(saved.read_bytes()[:200]), CUT_OFF),
    "cut off in the tensors": (lambda saved, bad: bad.write_bytes(saved.read_bytes()[:-9]), DAMAGED),
    "a flipped bit": (flip_last_byte, ("bad.safetensors' is damaged: '", "' is not what was saved", "Get or make it")),
    "no document": (lambda saved, bad: write_with(saved, bad, lambda _: {}), NO_RECIPE),
    "a list for metadata": (lambda saved, bad: write_with(saved, bad, lambda _: ["regraft"]), ("bad.safetensors' ",)),
    "a number for a document": (lambda saved, bad: write_with(saved, bad, lambda _: {"regraft": 5}), BAD_HEADER),
    "half a document": (lambda saved, bad: write_with(saved, bad, lambda _: {"regraft": "{"}), BAD_HEADER),
    "a wrong field": (lambda saved, bad: write_with(saved, bad, document(card=[1])), BAD_HEADER),
    "a future format": (lambda saved, bad: write_with(saved, bad, document(format="2.0", card=[1])), NEWER),
}


@pytest.mark.parametrize("command", ["evaluate", "predict", "inspect"])
@pytest.mark.parametrize("case", BAD)
def test_cli_and_load_refuse_a_bad_checkpoint(case: str, command: str, saved: Path, photos: Path, cli: Cli) -> None:
    make, parts = BAD[case]
    make(saved, Path("bad.safetensors"))
    words = ("--verify",) if command == "inspect" else (photos,)  # without it, the header alone is read
    with nothing_written():
        assert_refused(cli(command, "bad.safetensors", *words, "--trust-code"), *parts)
        with pytest.raises(CheckpointError):
            regraft.load("bad.safetensors", trust_code=True)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_cli_and_load_import_no_code_of_a_checkpoint_without_leave(
    command: str, saved: Path, photos: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.zoo._import_file", lambda *_: pytest.fail("imported"))
    with nothing_written():
        assert_refused(cli(command, saved, photos), "names Python code", "would run with your rights", "--trust-code")
    with pytest.raises(TrustError, match="trust_code=True"):
        regraft.load(saved)


def test_cli_predict_and_evaluate_take_the_base_of_a_delta(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    attach(model, classes=("a", "b"), task="classification", preprocessing=Preprocessing(size=8, resize=8))
    base = save(model, tmp_path / "base.safetensors")
    delta = save(changed(model, "1.bias"), tmp_path / "delta.safetensors", base=base)
    (tmp_path / "bases").mkdir()
    shutil.move(base, tmp_path / "bases")
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    for command in ("predict", "evaluate"):
        words = [command, str(delta), str(tmp_path / "photos")]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "--base" in refused.output
        ran = CliRunner().invoke(app, [*words, "--base", str(tmp_path / "bases")])
        assert ran.exit_code == 0, ran.output


def test_cli_evaluate_writes_a_report(cli: Cli, saved: Path, photos: Path) -> None:
    (photos / "cats" / "bad.jpg").write_text("no photo")
    words = ("evaluate", saved, photos, "--trust-code")
    result = cli(*words, "--report", "test.html", "--json")
    value = only_json(result.stdout)
    assert value["report"] == "test.html"
    page = Page(Path("test.html").read_text())
    assert_complete_in_itself(page)
    correct = round(value["accuracy"] * 12)
    assert f"Accuracy {100 * value['accuracy']:.1f} % {correct} of 12 photos" in page.text
    assert f"{photos}/cats/bad.jpg not an image" in page.text
    assert all(f" {phase} " in page.text for phase in ("start", "model", "reading", "evaluating", "report"))
    assert {attributes["href"][1:] for attributes in page.all("a")} <= {a["id"] for _, a in page.tags if "id" in a}
    assert only_json(cli(*words, "--report", "plain.html", "--no-heat-maps", "--json").stdout)["report"] == "plain.html"
    assert len(Page(Path("plain.html").read_text()).all("img")) == len(page.photos)
    with nothing_written():
        assert_refused(cli(*words, "--report", "test.html"), "'test.html' exists. Choose another --report")
        assert_refused(cli(*words, "--report", "test.pdf"), "'test.pdf' does not end in .html")
        assert_refused(cli(*words, "--report", "no/test.html"), "no folder 'no' to write 'test.html' into")


def test_cli_evaluate_fits_into_80_columns(cli: Cli, tmp_path: Path) -> None:
    names = tuple(f"a very long name of a class of photos, number {index}" for index in range(12))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12))
    attach(model, classes=names, task="classification", preprocessing=Preprocessing(size=8, resize=8))
    save(model, "m.safetensors")
    write_folder(tmp_path / "data", names, count=2)
    lines = cli("evaluate", "m.safetensors", "data").stdout.splitlines()
    metrics = regraft.evaluate(model, "data")
    low, high = metrics.accuracy_interval or (0, 0)
    assert lines[1] == f"95 % interval {low:.4f} to {high:.4f} (Wilson)"
    assert max(map(len, lines)) <= 80
    true, predicted, count = metrics.confusions()[0]
    first = lines[lines.index("") + 16]
    assert true[-9:] in first
    assert predicted[-9:] in first
    assert first.endswith(f"{count} of 2")
