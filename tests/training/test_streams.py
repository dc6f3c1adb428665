"""Runs on shards, and on datasets that stream: the same as on the same photos in folders."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import regraft
import tiny
from data.shards import numbered, photo, write_shards, write_tar
from regraft.errors import DataError
from scene import Recorder

SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 0.02, "progress": False}


def net(*frozen: str) -> torch.nn.Module:
    torch.manual_seed(2)
    model = tiny.PlainCnn(num_classes=2)
    if frozen:
        regraft.freeze(model, *frozen)
    return model


def weights(result: regraft.FitResult) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in result.model.state_dict().values()])


def write_both(root: Path, count: int = 12) -> tuple[Path, Path]:
    """Write the same photos as folders of classes and as shards, in the same order."""
    for part, first in (("train", 0), ("val", 100)):
        files: dict[str, bytes] = {}
        for number in sorted(range(first, first + count), key=lambda number: number % 2):
            folder = root / "folders" / part / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:04}.jpg").write_bytes(photo(number))
            files |= {f"{number:04}.jpg": photo(number), f"{number:04}.cls": (b"cat", b"dog")[number % 2]}
        names = list(files)
        for shard in range(2):
            half = names[shard * count : (shard + 1) * count]
            write_tar(root / "shards" / f"{part}-{shard}.tar", {name: files[name] for name in half})
    return root / "folders", root / "shards"


@pytest.mark.parametrize(
    ("frozen", "options"),
    [(("conv*", "bn*"), {}), (("conv1", "bn1"), {"augment": "standard"}), ((), {"workers": 2, "cache": False})],
    ids=["features", "pixels", "workers"],
)
def test_fit_on_shards_gives_the_weights_of_the_same_photos_in_folders(
    frozen: tuple[str, ...], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, shards = write_both(tmp_path)
    expected = regraft.fit(net(*frozen), folders, **SMALL, **options)
    if "workers" in options:
        monkeypatch.setattr("regraft.data.photos.fit_memory", lambda *_: False)  # the processes open the shards
    result = regraft.fit(net(*frozen), shards, **SMALL, **options)
    assert torch.equal(weights(result), weights(expected))
    assert result.plan.counts == expected.plan.counts == (("cat", 6, 6), ("dog", 6, 6))
    assert regraft.evaluate(result.model, shards, progress=False).accuracy == result.validation.accuracy
    predictions = regraft.predict(result.model, shards / "val-0.tar", progress=False)
    assert [found.path for found in predictions] == list(result.paths[:6])
    assert predictions[0].to_dict()["path"] == f"{shards}/val-0.tar/0100.jpg"
    one = regraft.predict(result.model, f"{shards}/val-0.tar/0102.jpg", progress=False)
    assert [str(found) for found in one] == [str(predictions[1])]


def test_fit_on_shards_computes_features_once_and_anew_after_a_change(tmp_path: Path) -> None:
    _, shards = write_both(tmp_path)

    def was_kept() -> list[str]:
        told = Recorder()
        regraft.fit(net("conv*", "bn*"), shards, **{**SMALL, "progress": told})
        return [line for line in told.lines if "found in the cache" in line]

    assert not was_kept()
    assert was_kept()
    write_tar(shards / "train-0.tar", numbered(6, ("cat", "dog")))
    assert not was_kept()


def test_fit_on_shards_skips_photos_that_cannot_be_read_and_says_which(tmp_path: Path) -> None:
    files = numbered(40)
    write_tar(tmp_path / "a.tar", {**files, "0004.jpg": b"no photo", "0005.jpg": b""})
    told = Recorder()
    result = regraft.fit(net(), tmp_path, **{**SMALL, "progress": told})
    reasons = {str(found.path): found.reason for found in result.plan.unreadable}
    assert reasons == {f"{tmp_path}/a.tar/0004.jpg": "not an image", f"{tmp_path}/a.tar/0005.jpg": "the file is empty"}
    assert f"skipped    '{tmp_path}/a.tar/0004.jpg': not an image" in told.lines
    with pytest.raises(DataError, match=r"2 of 40 files cannot be read \('.*a\.tar/000\d\.jpg': .*Repair or remove"):
        regraft.fit(net(), tmp_path, max_unreadable=0.01, **SMALL)


def test_fit_on_shards_continues_a_run_and_keeps_its_photos_in_the_report(tmp_path: Path) -> None:
    _, shards = write_both(tmp_path)

    def stop(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(outputs, targets)

    options = {**SMALL, "epochs": 3}
    calls: list[int] = []
    expected = regraft.fit(net(), shards, **options)
    with pytest.raises(KeyboardInterrupt):
        regraft.fit(net(), shards, loss=stop, out=str(tmp_path / "run"), **options)
    result = regraft.fit(net(), shards, loss=stop, out=str(tmp_path / "run"), resume=True, **options)
    assert torch.equal(weights(result), weights(expected))
    page = regraft.write_report(result, tmp_path / "report.html").read_text()
    assert "val-0.tar/0100.jpg" in page
    assert page.count("data:image/jpeg") > 2


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"image": Image.open(io.BytesIO(photo(number))), "label": number % 2} for number in range(first, first + count)
    ]


class Items(Dataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def hugging_face(tmp_path: Path, count: int, first: int) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    encoded = [{"bytes": photo(number), "path": None} for number in range(first, first + count)]
    labels = [number % 2 for number in range(first, first + count)]
    return datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)


def webdataset(tmp_path: Path, count: int, first: int) -> Any:
    library = pytest.importorskip("webdataset")
    return library.WebDataset(
        str(write_tar(tmp_path / f"{first}.tar", numbered(count, first=first))), shardshuffle=False
    )


def litdata(tmp_path: Path, count: int, first: int) -> Any:
    library = pytest.importorskip("litdata")
    cache = pytest.importorskip("litdata.streaming.cache").Cache(str(tmp_path / f"{first}"), chunk_size=5)
    for index, row in enumerate(rows(count, first)):
        cache[index] = row
    cache.done()
    cache.merge()
    return library.StreamingDataset(str(tmp_path / f"{first}"))


KINDS: dict[str, Callable[[Path, int, int], Any]] = {
    "Hugging Face, streamed": lambda *a: hugging_face(*a).to_iterable_dataset(),
    "Hugging Face, as tensors": lambda *a: hugging_face(*a).with_format("torch"),
    "webdataset": webdataset,
    "webdataset, decoded": lambda *a: webdataset(*a).decode("pil").to_tuple("jpg", "cls"),
    "litdata": litdata,
    "dicts": lambda _, count, first: Items(rows(count, first)),
    "pairs of bytes": lambda _, count, first: Items([(photo(n), n % 2) for n in range(first, first + count)]),
}


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of libraries
@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes_datasets_of_photos_as_they_are(kind: str, tmp_path: Path) -> None:
    _, shards = write_both(tmp_path)
    make = KINDS[kind]
    train, validation = make(tmp_path / "s", 12, 0), make(tmp_path / "s", 12, 100)
    result = regraft.fit(net(), (train, validation), augment="none", **SMALL)
    assert result.validation.count == 12
    measured = regraft.evaluate(result.model, make(tmp_path / "t", 12, 100), progress=False)
    assert measured.accuracy == result.validation.accuracy
    result.model.regraft_card = result.model.regraft_card.model_copy(update={"classes": ("cat", "dog")})  # as in shards
    assert regraft.evaluate(result.model, shards, progress=False).accuracy == measured.accuracy


def test_fit_takes_datasets_of_hugging_face_like_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folders, _ = write_both(tmp_path)
    train, validation = hugging_face(tmp_path, 12, 0), hugging_face(tmp_path, 12, 100)
    order = sorted(range(12), key=train["label"].__getitem__)
    by_class = train.select(order), validation.select(order)
    expected = regraft.fit(net("conv*", "bn*"), folders, **SMALL)
    result = regraft.fit(net("conv*", "bn*"), by_class, **SMALL)
    assert torch.equal(weights(result), weights(expected))
    assert result.plan.counts == expected.plan.counts
    assert regraft.evaluate(result.model, validation, progress=False).accuracy == result.validation.accuracy
    parts = datasets.DatasetDict(train=train, test=validation)
    assert regraft.fit(net(), parts, **SMALL).validation.count == 12
    drawn = regraft.fit(net(), train, validation_share=0.5, **SMALL)
    assert drawn.validation.count == 6
    assert regraft.evaluate(drawn.model, train, progress=False).count == 6
    with pytest.raises(DataError, match=r"the dataset has the parts 'all', expected 'train' and 'validation'"):
        regraft.fit(net(), datasets.DatasetDict(all=train), **SMALL)
    with pytest.raises(DataError, match=r"a Dataset of Hugging Face has no rows\. Give one with photos in it\."):
        regraft.fit(net(), (train, validation.select([])), **SMALL)
    with pytest.raises(DataError, match=r"'dataset' has labels that are not classes of the model: 'dog2'"):
        regraft.evaluate(result.model, validation.cast_column("label", datasets.ClassLabel(names=["dog", "dog2"])))


BAD = {
    "no class": (
        [{"image": photo(0)}] * 8,
        r"dicts with 'image', expected one photo \('image'\) and one class \('label'\)",
    ),
    "a name as class": ([{"image": photo(0), "label": "cat"}] * 8, r"a label of the data is 'cat', expected a number"),
    "no photo": ([(b"text", 0)] * 8, r"a photo of the data \(bytes\) cannot be read: not an image\. Leave it out"),
    "cut off": ([(photo(0)[:300], 0)] * 8, r"a photo of the data \(bytes\) cannot be read: OSError: "),
}


@pytest.mark.parametrize("name", BAD)
def test_fit_refuses_items_that_are_no_photos(name: str) -> None:
    items, message = BAD[name]
    with pytest.raises(DataError, match=message):
        regraft.fit(net(), (Items(items), Items(items)), **SMALL)


def test_fit_says_that_a_dataset_may_yield_dicts_where_a_loader_does() -> None:
    batches = DataLoader(Items([{"image": torch.zeros(3, 8, 8), "label": 0}] * 4), 2)
    with pytest.raises(
        DataError, match="pass the dataset itself, which may yield dicts, or give the loader a collate_fn"
    ):
        regraft.fit(net(), (batches, batches), **SMALL)


def test_cli_train_takes_a_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from regraft.cli.app import app

    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", 20)
    options = ["--weights", "none", "--image-size", "32", "--epochs", "1", "--out", "run"]
    answer = CliRunner().invoke(app, ["train", "shards", *options])
    assert answer.exit_code == 0, answer.output
    answer = CliRunner().invoke(app, ["predict", "run", "shards", "--out", "p.csv"])
    assert answer.exit_code == 0, answer.output
    assert "shards/000000.tar/0000.jpg," in (tmp_path / "p.csv").read_text()
    shutil.rmtree(tmp_path / "shards")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(b"")
    answer = CliRunner().invoke(app, ["evaluate", "run", "shards"])
    assert answer.exit_code == 2
    assert "ends early" in answer.output
