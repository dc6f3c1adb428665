import csv
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tiny
from oracles import identical, same, snapshot
from regraft import FitResult, TrainConfig, evaluate, fit, freeze, load, predict, write_report
from regraft.card import card_of
from regraft.errors import ConfigError, DataError, Interrupted, LossError, ModelError, SelectionError
from regraft.progress import Progress
from training.factories import dataset, three_classes

OPTIONS = {"epochs": 3, "batch_size": 8, "lr": 0.02}
COLOURS = {"blue": (30, 40, 200), "green": (20, 190, 60), "red": (220, 30, 30)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of small photos in three colours."""
    root, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + noise.normal(0, 30, (12, 14, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a table of gray photos and how bright they are."""
    root = tmp_path_factory.mktemp("brightness")
    rows = []
    for number in range(40):
        level = number / 39
        Image.fromarray(np.full((10, 10, 3), round(255 * level), np.uint8)).save(root / f"{number}.png")
        rows.append({"path": f"{number}.png", "target": f"{level:.4f}"})
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "target"])
        writer.writeheader()
        writer.writerows(rows)
    return root / "table.csv"


class Labelled(Dataset):
    """A dataset with class names, whose targets are plain ints."""

    classes = ("x", "y", "z")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, target = dataset()[index]
        return image, int(target)


DATA: dict[str, Callable[[Path], object]] = {
    "datasets": lambda photos: (dataset(), dataset(12, 1)),
    "loaders": lambda photos: (DataLoader(dataset(), 8, shuffle=True), DataLoader(dataset(12, 1), 5)),
    "named classes": lambda photos: (Labelled(), Labelled()),
    "a list of batches": lambda photos: ([(dataset()[:12]), (dataset()[12:])], [dataset(12, 1)[:]]),
    "folder": lambda photos: photos,
}


@pytest.mark.parametrize("data", DATA.values(), ids=list(DATA))
def test_fit_learns_and_the_same_seed_gives_the_same_weights(data: Callable[[Path], object], photos: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # what was drawn before must not matter
        results.append(fit(three_classes(), data(photos), seed=seed, **OPTIONS | {"epochs": 5}))
    first, again, other = (result.model.state_dict() for result in results)
    assert all(identical(tensor, again[name]) for name, tensor in first.items())
    assert not all(identical(tensor, other[name]) for name, tensor in first.items())
    assert results[0].validation.accuracy > 0.6
    assert results[0].history[-1].train_loss < results[0].history[0].train_loss


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_fit_leaves_the_global_random_state_as_before(
    fails: bool, random_state: Callable[[], tuple[object, ...]]
) -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        return nn.functional.cross_entropy(outputs, targets) * (float("nan") if fails else 1)

    before = random_state()
    try:
        fit(three_classes(), (dataset(), dataset(12, 1)), loss=loss, **OPTIONS)
    except LossError:
        assert fails
    assert random_state() == before


def test_fit_keeps_the_best_epoch_and_not_the_last() -> None:
    result = fit(three_classes(), (dataset(), dataset(30, 1)), **OPTIONS | {"epochs": 8, "lr": 0.3})
    best = result.history[result.best_epoch - 1].validation
    assert best == result.validation
    assert all(not record.validation.is_better_than(best) for record in result.history)
    assert evaluate(result.model, dataset(30, 1), batch_size=8).accuracy == best.accuracy
    assert not any(module.training for module in result.model.modules())
    with torch.inference_mode():
        outputs = result.model(dataset(30, 1).tensors[0])
    assert torch.allclose(outputs, result.outputs, atol=1e-5)


def test_fit_keeps_the_last_epoch_and_validates_some_where_that_is_asked_for(tmp_path: Path) -> None:
    def run(**options: object) -> FitResult:
        return fit(three_classes(), (dataset(), dataset(9, seed=1)), **{**OPTIONS, "epochs": 7, **options})

    whole = run(keep_epoch="last")
    assert whole.best_epoch == 7
    assert whole.validation == whole.history[-1].validation
    some = run(keep_epoch="last", validate_every=3, out=tmp_path / "run")
    assert [record.epoch for record in some.history] == [3, 6, 7]
    assert [record.validation for record in some.history] == [
        whole.history[epoch - 1].validation for epoch in (3, 6, 7)
    ]
    for name, tensor in whole.model.state_dict().items():
        assert identical(tensor, some.model.state_dict()[name]), name
    assert identical(
        load(tmp_path / "run/model.safetensors", trust_code=True).state_dict()["fc.weight"], some.model.fc.weight
    )
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 4
    page = write_report(some, tmp_path / "page.html").read_text()
    assert "The last epoch was kept, so nothing was chosen on the 9 validation" in page
    assert "7 of 7" in page


@pytest.mark.parametrize("patterns", [("conv1", "bn1"), ("conv*", "bn*")])
def test_fit_leaves_what_is_frozen_bit_identical(patterns: tuple[str, ...], photos: Path) -> None:
    model = three_classes()
    freeze(model, *patterns)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, photos, **OPTIONS)
    layers = {"conv1", "bn1"} if "conv1" in patterns else {"conv1", "bn1", "conv2", "bn2"}
    for name, tensor in model.state_dict().items():
        assert identical(before[name], tensor) == (name.partition(".")[0] in layers), name


def test_fit_freezes_by_an_option(photos: Path) -> None:
    result = fit(three_classes(), photos, freeze_until="bn2", **OPTIONS)
    assert {name for name, p in result.model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert result.plan.trained_layers == ("fc",)


def test_fit_trains_the_module_that_was_given_in_place() -> None:
    model = three_classes()
    assert fit(model, (dataset(), dataset(12, 1)), **OPTIONS).model is model


def test_fit_result_figures_are_those_of_the_run(photos: Path, tmp_path: Path) -> None:
    result = fit(three_classes(), photos, out=str(tmp_path / "run"), **OPTIONS)
    assert [record.epoch for record in result.history] == [1, 2, 3]
    assert result.plan.counts == (("blue", 8, 4), ("green", 8, 4), ("red", 8, 4))
    assert result.plan.parameters == sum(p.numel() for p in result.model.parameters())
    assert card_of(result.model).classes == tuple(COLOURS)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation_accuracy"]) for row in rows] == [r.validation.accuracy for r in result.history]
    assert [float(row["train_loss"]) for row in rows] == [record.train_loss for record in result.history]


def test_fit_learns_a_table_of_numbers(brightness: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    model.preprocessing = tiny.PlainCnn.preprocessing
    result = fit(model, brightness, epochs=30, lr=0.02, weight_decay=0.0, out=str(tmp_path / "run"))
    assert result.plan.task == "regression"
    assert result.validation.r2 is not None
    assert result.validation.r2 > 0.5
    loaded = load(result.checkpoint)
    assert evaluate(loaded, brightness).r2 is not None
    values = [found.value for found in predict(loaded, [brightness.parent / f"{n}.png" for n in (0, 20, 39)])]
    assert values == sorted(values)
    assert [found.label for found in predict(loaded, brightness.parent)] == [None] * 40


def test_fit_takes_numbers_in_datasets_as_a_regression() -> None:
    inputs = torch.randn(64, 12)
    data = TensorDataset(inputs, inputs.sum(1))
    result = fit(nn.Linear(12, 1), (data, data), epochs=40, lr=0.05, weight_decay=0.0)
    assert result.validation.r2 > 0.9


def test_evaluate_gives_the_accuracy_of_fit_for_the_folder_again(photos: Path, tmp_path: Path) -> None:
    result = fit(three_classes(), photos, out=str(tmp_path / "run"), **OPTIONS)
    assert evaluate(result.model, photos).accuracy == result.validation.accuracy
    assert evaluate(result.model, photos).confusion == result.validation.confusion
    labels = [found.label for found in predict(result.model, photos / "val")]
    assert labels == [tuple(COLOURS)[place] for place in result.outputs.argmax(1)]


def test_predict_takes_images_paths_and_tensors_alike(photos: Path) -> None:
    model = fit(three_classes(), photos, **OPTIONS).model
    paths = sorted((photos / "val" / "red").iterdir())
    pictures = [Image.open(path).convert("RGB") for path in paths]
    by_path, by_image = predict(model, paths), predict(model, pictures)
    assert [found.label for found in by_path] == [found.label for found in by_image]
    assert [found.probability for found in by_path] == pytest.approx([found.probability for found in by_image])
    assert [found.path for found in by_path] == paths
    assert all(sum(p for _, p in found.top) == pytest.approx(1) for found in by_path)
    assert len(predict(model, paths[0], top=2)[0].top) == 2
    tensor = torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.inference_mode():
        expected = model(tensor).argmax(1)
    assert [found.label for found in predict(model, tensor)] == [tuple(COLOURS)[place] for place in expected]


class StopsAfter(Progress):
    """Presses Ctrl-C when the second epoch begins."""

    def track(self, items, description, total=None):
        if description.startswith("epoch 2"):
            raise KeyboardInterrupt
        yield from items


def test_fit_keeps_the_best_weights_so_far_at_ctrl_c(tmp_path: Path) -> None:
    model = three_classes()
    data = (dataset(), dataset(12, 1))
    with pytest.raises(Interrupted, match=r"stopped by Ctrl-C\. The best so far \(epoch 1, .*is kept in the model"):
        fit(model, data, progress=StopsAfter(), **OPTIONS | {"schedule": "constant"})
    one = three_classes()
    fit(one, data, **OPTIONS | {"schedule": "constant", "epochs": 1})
    assert all(identical(tensor, one.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("length", [9, 17])
def test_fit_before_batch_norm_is_not_stopped_by_a_last_batch_of_one_photo(length: int) -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    data = TensorDataset(torch.randn(length, 12), torch.arange(length) % 3)
    assert len(fit(model, (data, data), **OPTIONS).history) == 3


def frozen_all() -> nn.Module:
    model = three_classes()
    freeze(model)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], object], dict[str, object], type[Exception], str]] = {
    "no pair": (three_classes, dataset, {}, DataError, "data is a TensorDataset, expected a folder"),
    "no folder": (three_classes, lambda: "nowhere", {}, DataError, "no folder 'nowhere'"),
    "empty": (three_classes, lambda: ([], []), {}, DataError, "the training data is empty"),
    "no pairs": (
        three_classes,
        lambda: ([torch.zeros(2, 3, 8, 8)], [torch.zeros(2, 3, 8, 8)]),
        {},
        DataError,
        "expected pairs (inputs, targets) of tensors",
    ),
    "other width": (
        lambda: tiny.PlainCnn(num_classes=2),
        lambda: (dataset(), dataset()),
        {},
        ModelError,
        "PlainCnn gives 2 scores, the data has 3 classes. Use model = regraft.replace_head(model, 3).",
    ),
    "other shape": (
        three_classes,
        lambda: (TensorDataset(torch.zeros(9, 4, 8, 8), torch.arange(9) % 3),) * 2,
        {},
        ModelError,
        "PlainCnn fails on a batch of shape (8, 4, 8, 8)",
    ),
    "all frozen": (frozen_all, lambda: (dataset(), dataset()), {}, SelectionError, "is frozen, so there is nothing"),
    "unknown option": (
        three_classes,
        lambda: (dataset(), dataset()),
        {"epoch": 3},
        ConfigError,
        "no option 'epoch'. Nearest: 'epochs'",
    ),
    "wrong value": (
        three_classes,
        lambda: (dataset(), dataset()),
        {"schedule": "linear"},
        ConfigError,
        "'schedule' cannot be 'linear': expected one of cosine, constant",
    ),
    "vector loss": (
        three_classes,
        lambda: (dataset(), dataset()),
        {"loss": nn.CrossEntropyLoss(reduction="none")},
        LossError,
        "a tensor of shape (8,), expected one number",
    ),
    "name without a folder": (
        lambda: "resnet18",
        lambda: (dataset(), dataset()),
        {},
        ConfigError,
        "a model's name needs a folder as data",
    ),
}


@pytest.mark.parametrize(("make", "data", "options", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_fit_refuses_what_cannot_work_before_anything_changes(
    make: Callable[[], nn.Module],
    data: Callable[[], object],
    options: dict[str, object],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        fit(model, data(), out=str(tmp_path / "run"), **OPTIONS | options)
    assert message in str(caught.value)
    assert before is None or same(before, snapshot(model))
    assert not (tmp_path / "run").exists()


def test_fit_keeps_what_was_best_where_a_loss_explodes() -> None:
    model, calls = three_classes(), []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(outputs, targets) * (float("inf") if len(calls) > 5 else 1)

    with pytest.raises(LossError, match=r"epoch 2: the loss is inf at step 2 .*The best so far \(epoch 1"):
        fit(model, (dataset(), dataset(12, 1)), loss=loss, **OPTIONS)
    assert card_of(model).metrics["count"] == 12


def test_fit_options_win_over_the_configuration() -> None:
    result = fit(three_classes(), (dataset(), dataset(9)), config=TrainConfig(epochs=9, lr=0.1), epochs=1)
    assert (result.config.epochs, result.config.lr, len(result.history)) == (1, 0.1, 1)
