"""A run that is stopped and continued ends with the weights, bit for bit, of one that was never stopped."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regraft
import tiny
from oracles import identical
from regraft.checkpoint.file.tree import read_tree
from regraft.errors import CheckpointError, ConfigError, DataError, Interrupted, LossError
from regraft.progress import SILENT, Progress
from regraft.training.config import read_config
from training.factories import StopsAt, assert_same, dataset, write_photos
from training.runs import OPTIMIZERS, RUNS, SMALL, STOPS, Noisy, Stop, generator, net


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 16)


@pytest.fixture(scope="module")
def more_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("more"), 48)


@pytest.fixture(scope="module")
def table(photos: Path) -> Path:
    rows = [f"{path.relative_to(photos)},{number / 7}" for number, path in enumerate(sorted(photos.rglob("*.png")))]
    (photos / "table.csv").write_text("\n".join(["path,target", *rows]))
    return photos / "table.csv"


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Any, Path]]:
    """Keep the results and folders of runs that were never stopped, by name: one for all ways to stop it."""
    return {}


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Callable[[str], tuple[nn.Module, Any, dict[str, Any]]]:
    def build(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
        model, data, options = RUNS[name](request.getfixturevalue)
        size = {"image_size": tiny.SIDE} if isinstance(data, Path) else {}
        return model, data, {**SMALL, **size, **options}

    return build


def train(made: tuple[nn.Module, Any, dict[str, Any]], out: Path, progress: Progress = SILENT, **more: Any) -> Any:
    model, data, options = made
    return regraft.fit(model, data, out=str(out), progress=progress, **{**options, **more})


CASES = [(name, stops) for name in RUNS for stops in STOPS if name not in OPTIMIZERS or stops is STOPS[1]]


@pytest.mark.parametrize(("name", "stops"), CASES, ids=str)
def test_fit_resume_goes_on_as_if_nothing_had_happened(
    name: str, stops: list[Stop], make: Any, whole: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    if name not in whole:
        whole[name] = train(make(name), tmp_path / "whole"), tmp_path / "whole"
    undisturbed, folder = whole[name]
    out = tmp_path / "stopped"
    for number, (epoch, step) in enumerate(stops):
        begun = step - sum(s for e, s in stops[:number] if e == epoch)  # of the steps that are left of that epoch
        with pytest.raises(Interrupted, match="stopped by Ctrl-C"):
            train(make(name), out, StopsAt(epoch, begun), resume=True)
        assert (out / "last").is_dir()
    found = train(make(name), out, resume=True)
    assert_same(found, undisturbed)
    left = {"model.safetensors", "metrics.csv", "config.toml"}
    assert {child.name for child in out.iterdir()} == left
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    options = [read_config(path / "config.toml") | {"out": ""} for path in (out, folder)]
    assert options[0] == options[1]
    ours = [line.rsplit(",", 1)[0] for line in (out / "metrics.csv").read_text().splitlines()]
    assert ours == [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]


def test_fit_resume_with_two_workers(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Any, dict[str, Any]]:
        loaders = DataLoader(Noisy(22), 6, shuffle=True, num_workers=2), DataLoader(dataset(9, 1), 9)
        return net(3), loaders, SMALL | {"epochs": 2}

    undisturbed = train(made(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(made(), tmp_path / "stopped", StopsAt(1, 3))
    assert_same(train(made(), tmp_path / "stopped", resume=True), undisturbed)


def test_fit_stops_at_a_signal_while_it_is_measured_without_waiting_for_the_end(make: Any, tmp_path: Path) -> None:
    name = "loaders that draw from the global generator"
    undisturbed = train(make(name), tmp_path / "whole")
    model, data, options = make(name)
    seen: list[bool] = []

    def stop(*_: object) -> None:
        seen.append(model.training)
        if not model.training and seen.count(False) == 2 + 3:  # the first batch is tried; three batches are measured
            signal.raise_signal(signal.SIGTERM)

    hook = model.fc.register_forward_hook(stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        train((model, data, options), tmp_path / "stopped")
    hook.remove()
    assert caught.value.exit_code == 143
    assert seen.count(False) == 2 + 3
    assert_same(train(make(name), tmp_path / "stopped", resume=True), undisturbed)


def test_fit_resume_ends_with_the_state_after_the_last_epoch(make: Any, tmp_path: Path) -> None:
    undisturbed = train(make("datasets"), tmp_path / "whole")

    class StopsAtTheEnd(Progress):
        def say(self, line: str) -> None:
            if line.startswith("epoch 3/3"):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(make("datasets"), tmp_path / "stopped", StopsAtTheEnd())
    assert_same(train(make("datasets"), tmp_path / "stopped", resume=True), undisturbed)


def test_fit_stops_at_once_at_a_second_signal_and_keeps_the_state_before_it(make: Any, tmp_path: Path) -> None:
    model, data, options = make("datasets")

    def twice(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(steps := twice.steps) == 8:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        steps.append(1)
        return nn.functional.cross_entropy(outputs, targets)

    twice.steps = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by Ctrl-C"):
        train((model, data, options), tmp_path / "run", loss=twice, checkpoint_minutes=0)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(twice.steps) == 8
    assert [file.name for file in sorted((tmp_path / "run/last").iterdir())] == [
        "state-000002-000000002.safetensors",
        "state-000002-000000003.safetensors",
    ]


def test_fit_leaves_an_ignored_signal_ignored(make: Any, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(train(make("datasets"), tmp_path / "run", StopsAt(1, 2)).history) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_fit_without_a_folder_keeps_the_best_in_the_module(make: Any) -> None:
    model, data, options = make("datasets")
    with pytest.raises(
        Interrupted, match=r"^stopped by SIGTERM\. The best so far \(epoch 1, .* is kept in the model\.$"
    ):
        regraft.fit(model, data, progress=StopsAt(2, 1, signal.SIGTERM), **options)
    with pytest.raises(Interrupted, match=r"^stopped by Ctrl-C\. Nothing was written: no epoch was complete\.$"):
        regraft.fit(net(3), data, progress=StopsAt(1, 1), **options)


def test_fit_writes_states_as_often_as_asked_and_keeps_the_last_few(make: Any, tmp_path: Path) -> None:
    names: set[str] = set()

    class Looks(Progress):
        def track(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
            for item in items:
                names.update(file.name for file in (tmp_path / "run/last").glob("state-*"))
                assert len(list((tmp_path / "run/last").glob("state-*"))) <= 4
                yield item

    train(make("datasets"), tmp_path / "run", Looks(), checkpoint_minutes=0, keep_last=3)
    assert len(names) >= 3 * 4 - 2
    assert not (tmp_path / "run/last").exists()


def test_fit_resume_needs_nothing_to_begin_with(make: Any, tmp_path: Path) -> None:
    assert_same(train(make("datasets"), tmp_path / "a", resume=True), train(make("datasets"), tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"resume needs the folder of the run\. Pass out="):
        regraft.fit(net(3), (dataset(20), dataset(9)), resume=True)


def stopped(make: Any, out: Path, name: str = "datasets", **more: Any) -> None:
    with pytest.raises(Interrupted):
        train(make(name), out, StopsAt(2, 2), **more)


def test_fit_resume_passes_over_a_damaged_state(make: Any, tmp_path: Path) -> None:
    undisturbed, out = train(make("datasets"), tmp_path / "whole"), tmp_path / "run"
    stopped(make, out, checkpoint_minutes=0)
    older, newest = sorted((out / "last").iterdir())
    newest.write_bytes(newest.read_bytes()[:-3])
    progress = StopsAt(0, 0)
    assert_same(train(make("datasets"), out, progress, resume=True), undisturbed)
    assert any(line.startswith(f"state      passed over: '{newest}' is damaged") for line in progress.lines)
    assert any(line == f"continued  after step 1 of epoch 2, from '{older}'" for line in progress.lines)


def test_fit_resume_refuses_states_that_are_all_damaged(make: Any, tmp_path: Path) -> None:
    stopped(make, tmp_path / "run")
    for file in (tmp_path / "run/last").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"none of the \d states in '.*last' can be read\. Start again with"):
        train(make("datasets"), tmp_path / "run", resume=True)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.5}, r"has other options: lr was 0\.02, is 0\.5\. Continue it with its own"),
    "several": ({"epochs": 9, "seed": 1}, r"epochs was 3, is 9; seed was 0, is 1\."),
}


@pytest.mark.parametrize("case", OTHERS)
def test_fit_resume_refuses_other_options(case: str, make: Any, tmp_path: Path) -> None:
    options, message = OTHERS[case]
    stopped(make, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=message):
        train(make("datasets"), tmp_path / "run", resume=True, **options)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_fit_resume_refuses_another_network_or_other_frozen_weights(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(make, out, "cached features")
    _, data, options = make("cached features")
    other = net(frozen=("conv1", "bn1"))
    with torch.no_grad():
        other.conv1.weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the frozen weights are others .*Nothing was changed"):
        train((other, data, options), out, resume=True)
    assert all(identical(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"'conv1\.weight' has the shape None there and \(6, 3, 3, 3\) in PlainCnn"
    ):
        train((net(), data, options), out, resume=True)


def test_fit_resume_refuses_changed_photos(make: Any, tmp_path: Path) -> None:
    out, root = tmp_path / "run", write_photos(tmp_path / "own", 12)
    model, _, options = make("photos, each time anew")
    with pytest.raises(Interrupted):
        train((model, root, options), out, StopsAt(2, 1))
    moved = root.rename(tmp_path / "moved")
    renamed = (moved / "train/dark/0.png").rename(moved / "train/dark/00.png")
    with pytest.raises(DataError, match=r"the data is not what the run in '.*run' has seen so far"):
        train((net(), moved, options), out, resume=True)
    renamed.rename(moved / "train/dark/0.png")
    assert len(train((net(), moved, options), out, resume=True).history) == 3


def test_fit_that_fails_at_once_leaves_nothing_and_one_that_fails_later_its_state(make: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == failing.at:
            raise failing.error
        return nn.functional.cross_entropy(outputs, targets)

    for error, at, is_left in (
        (RuntimeError("broken"), 2, False),
        (RuntimeError("broken"), 7, True),
        (LossError("wrong"), 7, False),
    ):
        failing.error, failing.at = error, at
        calls.clear()
        out = tmp_path / f"{at}{type(error).__name__}"
        with pytest.raises(type(error)):
            train(make("datasets"), out, loss=failing, checkpoint_minutes=0)
        assert (out / "last").exists() == is_left
        assert out.exists() == (at == 7)


def test_fit_is_not_stopped_by_a_full_disk(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regraft.training.resume import state_writer

    undisturbed, progress, original = train(make("datasets"), tmp_path / "a"), StopsAt(0, 0), state_writer.write_tree

    def full(tree: Any, path: Path) -> None:
        if path.name > "state-000002":
            raise OSError(28, "No space left on device")
        original(tree, path)

    monkeypatch.setattr(state_writer, "write_tree", full)
    assert_same(train(make("datasets"), tmp_path / "b", progress, checkpoint_minutes=0), undisturbed)
    assert sum("state      not written: [Errno 28] No space left on device" in line for line in progress.lines) == 1
    with pytest.raises(Interrupted, match=r"The state of the run could not be written: .*No space left"):
        train(make("datasets"), tmp_path / "c", StopsAt(3, 1), checkpoint_minutes=0)
    monkeypatch.undo()
    kept = sorted((tmp_path / "c/last").iterdir())
    assert [file.name[:12] for file in kept] == ["state-000001", "state-000001"]
    assert all(read_tree(file)["standing"]["epoch"] == 1 for file in kept)
    assert_same(train(make("datasets"), tmp_path / "c", resume=True), undisturbed)


def test_fit_resume_replaces_results_of_an_older_run_as_in_one_go(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make("datasets"), out)
    (out / "report.html").write_text("old")
    with pytest.raises(Interrupted):
        train(make("mixup"), out, StopsAt(1, 1), overwrite=True)
    assert (out / "report.html").exists()
    undisturbed = train(make("mixup"), tmp_path / "whole")
    assert_same(train(make("mixup"), out, resume=True), undisturbed)
    assert not (out / "report.html").exists()


def test_fit_that_begins_in_the_folder_of_another_run_drops_its_states(make: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(make, out)
    with pytest.raises(ConfigError, match=r"is not empty.*or go on with what stopped there: resume=True"):
        train(make("mixup"), out)
    with pytest.raises(Interrupted):
        train(make("mixup"), out, StopsAt(1, 1), overwrite=True)
    assert_same(train(make("mixup"), out, resume=True), train(make("mixup"), tmp_path / "whole"))


def test_fit_resume_takes_data_of_the_same_kind_in_tensors(tmp_path: Path) -> None:
    inputs = torch.randn(30, 12, generator=generator())
    data = TensorDataset(inputs, inputs.sum(1))

    def made() -> tuple[nn.Module, Any, dict[str, Any]]:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 4), nn.Dropout(0.2), nn.Linear(4, 1)), (data, data), SMALL

    undisturbed = train(made(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(made(), tmp_path / "stopped", StopsAt(2, 3))
    assert_same(train(made(), tmp_path / "stopped", resume=True), undisturbed)
