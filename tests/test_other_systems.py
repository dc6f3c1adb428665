"""What macOS and Windows lack is hidden here, as nothing of this runs there: each call has a fallback that works."""

import ast
import copy
import functools
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from torch import nn

import regraft
import tiny
from oracles import identical
from regraft.card import Preprocessing, card_of
from regraft.checkpoint.file.positioned import read_at
from regraft.checkpoint.plan import plan_of, read_plan
from regraft.cli.predict import predict
from regraft.data.folders import list_data
from regraft.data.photos import Photos, free_memory_bytes, loader, read_photos
from regraft.data.samples import Sample
from regraft.data.transforms import augmentation
from regraft.errors import CheckpointError, Interrupted, RunError
from regraft.frontier.cache.rows import DiskTensor
from regraft.frontier.cache.store import ENTRY, Store, default_folder
from regraft.training.config import TrainConfig, make_config, read_config, write_config
from regraft.training.partial_batches import fault_tolerant_loader
from training.factories import StopsAt, assert_same, half_frozen, write_photos

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
PREPROCESSING = Preprocessing(size=tiny.SIDE, resize=tiny.SIDE + 2)
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 0.01, "image_size": tiny.SIDE}
# Of the modules below, what every system has and regraft calls. Another name needs a fallback, and a test of it here.
EVERYWHERE = {
    "os": {
        "PathLike",
        "abort",
        "close",
        "cpu_count",
        "devnull",
        "dup2",
        "environ",
        "fsencode",
        "fspath",
        "fstat",
        "fsync",
        "get_terminal_size",
    }
    | {"getpid", "open", "path", "sep", "utime", "walk", "O_RDONLY", "O_WRONLY"},
    "signal": {"SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN", "Signals", "getsignal", "signal"},
}
HIDDEN_OF_OS = ["preadv", "pread", "pwritev", "sysconf", "fork", "forkpty", "mkfifo", "sched_getaffinity", "getloadavg"]
HIDDEN_OF_SIGNAL = ["SIGCHLD", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGPIPE", "pthread_sigmask", "setitimer"]
ON_SOME_SYSTEMS = {"fcntl", "grp", "mmap", "pwd", "resource", "select", "syslog", "termios", "tty", "msvcrt", "winreg"}
TEXT_CALLS = {"open": 2, "read_text": 0, "write_text": 1}  # methods of Path → position of `encoding`


@functools.cache
def syntax() -> list[tuple[Path, ast.AST]]:
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(SOURCE.rglob("*.py"))}
    return [(file, node) for file, text in texts.items() for node in ast.walk(ast.parse(text))]


def test_other_systems_calls_are_asked_for_before_they_are_made() -> None:
    for file, node in syntax():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in EVERYWHERE:
            module, name = node.value.id, node.attr
            has_fallback = f'hasattr({module}, "{name}")' in file.read_text(encoding="utf-8")
            assert name in EVERYWHERE[module] or has_fallback, f"{file}:{node.lineno} calls {module}.{name}"
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        assert not names & (
            ON_SOME_SYSTEMS | EVERYWHERE.keys() if isinstance(node, ast.ImportFrom) else ON_SOME_SYSTEMS
        )


def test_other_systems_text_is_read_and_written_in_an_encoding_that_is_named() -> None:
    for file, node in syntax():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_CALLS:
            mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            is_text = node.func.attr != "open" or (isinstance(mode, str) and mode in ("r", "w", "a", "x"))
            if is_text or (node.func.attr == "open" and not node.args and isinstance(node.func.value, ast.Name)):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}"


@pytest.fixture(params=[True, False], ids=["with preadv", "without"])
def with_or_without_preadv(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.usefixtures("with_or_without_preadv")
def test_read_at_gives_bytes_at_an_offset_to_several_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = bytes(torch.randint(256, (1 << 20,), dtype=torch.uint8).tolist())  # line ends and Ctrl-Z of Windows too
    (tmp_path / "data").write_bytes(data)
    with (tmp_path / "data").open("rb", buffering=0) as file, ThreadPoolExecutor(4) as pool:

        def read(offset: int) -> bytes:
            memory = memoryview(bytearray(1000))
            return bytes(memory[: read_at(file, memory, offset)])

        offsets = range(0, len(data) + 2000, 777)
        assert list(pool.map(read, offsets)) == [data[offset : offset + 1000] for offset in offsets]


@pytest.mark.usefixtures("with_or_without_preadv")
@pytest.mark.parametrize("shard_bytes", [400, 10**9])
def test_load_reads_and_verifies_a_checkpoint_without_preadv(shard_bytes: int, tmp_path: Path) -> None:
    model = tiny.build("sequential")
    path = regraft.save(model, tmp_path / "model.safetensors", shard_bytes=shard_bytes)
    loaded = regraft.load(path).state_dict()
    assert all(identical(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is not what was saved"):
        regraft.load(path)


def disk_tensor(folder: Path) -> tuple[DiskTensor, torch.Tensor]:
    tensor = torch.arange(60.0).view(10, 2, 3)
    writer = Store(folder).write("key")
    writer.append([tensor])
    stored = writer.finish({}).tensors(in_memory=False)[0]
    assert isinstance(stored, DiskTensor)
    return stored, tensor


@pytest.mark.usefixtures("with_or_without_preadv")
def test_disk_tensor_reads_rows_from_the_disk(tmp_path: Path) -> None:
    stored, tensor = disk_tensor(tmp_path)
    assert identical(stored[torch.tensor([7, 0, 0, 9])], tensor[[7, 0, 0, 9]])
    assert identical(stored[2:5], tensor[2:5])
    os.truncate(tmp_path / "key" / "0.bin", 6 * 4 * 5 + 3)
    with pytest.raises(RunError, match=r"0.bin' was cut off while it was in use"):
        stored[torch.tensor([5])]


def test_disk_tensor_is_opened_anew_in_another_process(tmp_path: Path) -> None:
    stored, tensor = disk_tensor(tmp_path)
    copy = pickle.loads(pickle.dumps(stored))  # as for a process that is not forked
    del stored
    assert identical(copy[3:4], tensor[3:4])


def test_free_memory_bytes_are_known_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert 2**20 < free_memory_bytes() < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="the folder of Linux")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "{home}/.cache/regraft"),
        ({"XDG_CACHE_HOME": ""}, "{home}/.cache/regraft"),
        ({"XDG_CACHE_HOME": "/mine"}, "/mine/regraft"),
        ({"XDG_CACHE_HOME": "/mine", "REGRAFT_CACHE": "own/place"}, "own/place"),
        ({"REGRAFT_CACHE": ""}, "{home}/.cache/regraft"),
    ],
)
def test_default_folder_lies_where_it_lay(
    environment: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REGRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected.format(home=tmp_path))


def test_default_folder_is_in_the_folder_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    from platformdirs.macos import MacOS

    monkeypatch.delenv("REGRAFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(platformdirs, "PlatformDirs", MacOS)
    assert default_folder() == Path.home() / "Library" / "Caches" / "regraft"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return list(list_data(write_photos(tmp_path / "photos", 8)).train)


def on_access(samples: list[Sample], kind: Any) -> Photos:
    photos, _ = read_photos(samples, PREPROCESSING, classes=("dark", "light"))
    return replace(photos, pixels=None, views=augmentation(kind, PREPROCESSING))


@pytest.mark.parametrize("kind", ["none", "flip", "standard", "trivial"])
@pytest.mark.parametrize("make", [loader, fault_tolerant_loader])
def test_loader_gives_its_processes_what_can_be_pickled(
    make: Callable[..., Any], kind: str, samples: list[Sample]
) -> None:
    batches = make(on_access(samples, kind), 3, shuffle_seed=1)
    dataset, collate = pickle.loads(pickle.dumps((batches.dataset, batches.collate_fn)))
    keys = list(batches.sampler)[:3]
    pixels, targets = collate([dataset[key] for key in keys])
    expected, expected_targets = batches.collate_fn([batches.dataset[key] for key in keys])
    assert identical(pixels, expected)
    assert identical(targets, expected_targets)


@pytest.mark.slow  # each process imports torch
def test_loader_gives_the_same_batches_from_spawned_processes(samples: list[Sample]) -> None:
    photos = on_access(samples, "standard")
    batches = fault_tolerant_loader(photos, 3, shuffle_seed=1, workers=2)
    batches.multiprocessing_context = "spawn"
    expected = fault_tolerant_loader(photos, 3, shuffle_seed=1, workers=0)
    for (pixels, targets), (others, other_targets) in zip(batches, expected, strict=True):
        assert identical(pixels, others)
        assert identical(targets, other_targets)


def test_list_data_has_one_order_of_classes_whatever_that_of_paths_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "C", "a"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").touch()
    windows = pathlib.PureWindowsPath
    monkeypatch.setattr(pathlib.PurePath, "__lt__", lambda one, other: windows(str(one)) < windows(str(other)))
    assert list_data(tmp_path).classes == ("C", "a", "b")


def test_fit_needs_no_call_of_one_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module, names in ((os, HIDDEN_OF_OS), (signal, HIDDEN_OF_SIGNAL)):
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    photos = write_photos(tmp_path / "photos")
    model = half_frozen()
    first, _ = (regraft.fit(copy.deepcopy(model), photos, out=str(tmp_path / out), **OPTIONS) for out in "ab")
    weights = tiny.PlainCnn(num_classes=2)
    assert not regraft.load_weights(weights, tmp_path / "b" / "model.safetensors", strict=True).missing
    assert regraft.evaluate(first.model, photos).accuracy == first.validation.accuracy
    assert len(regraft.predict(first.model, [str(photos / "val")])) == 12


def test_create_model_takes_a_class_in_a_file_on_a_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("C:\\nets\\own.py")  # on this system a name with a colon and backslashes, which is read the same way
    file.write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Linear(2, 1)\n", encoding="utf-8", newline="\r\n"
    )
    assert isinstance(regraft.create_model(f"py:{file}:net", trust_code=True), nn.Linear)


def test_create_model_names_a_file_with_slashes_in_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets\\own.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Linear(2, 1)\n", encoding="utf-8"
    )
    monkeypatch.setattr(os, "sep", "\\")
    model = regraft.create_model("py:nets\\own.py:net", trust_code=True)
    assert card_of(model).recipe.source.name == "py:nets/own.py:net"


def test_save_writes_to_a_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, *flags: Any, **options: Any) -> int:
        if Path(path).is_dir():  # as on Windows
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *flags, **options)

    monkeypatch.setattr(os, "open", refusing)
    path = regraft.save(tiny.build("sequential"), tmp_path / "model.safetensors")
    assert regraft.diff(path, tiny.build("sequential")).identical


def test_list_data_reads_tables_of_windows(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    rows = [f"photos/train/dark/{number}.png,{number}" for number in range(4)]
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["path,target", *rows, ""]).encode())
    listing = list_data(tmp_path / "table.csv")
    assert sorted(sample.target for sample in (*listing.train, *listing.validation)) == [0, 1, 2, 3]


def test_read_config_and_read_plan_take_other_line_ends(own: str, tmp_path: Path) -> None:
    config, plan = TrainConfig(epochs=3, model="resnet18"), plan_of(regraft.create_model(own, trust_code=True))
    write_config(config, tmp_path / "config.toml")
    (tmp_path / "plan.toml").write_text(plan.to_toml(), encoding="utf-8")
    for file in tmp_path.glob("*.toml"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert make_config(read_config(tmp_path / "config.toml")) == config
    assert read_plan(tmp_path / "plan.toml") == plan


def test_predict_ends_rows_once_on_a_stream_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos")
    (tmp_path / "own.py").write_text(
        "import tiny\n\n\ndef net():\n    return tiny.PlainCnn(num_classes=2)\n", encoding="utf-8"
    )
    model = regraft.create_model(f"py:{tmp_path / 'own.py'}:net", trust_code=True)
    path = regraft.fit(model, photos, out=str(tmp_path / "run"), **OPTIONS).checkpoint
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", newline="\r\n"))
    predict(str(path), [str(photos / "val")], trust_code=True, as_csv=True, device="cpu")
    sys.stdout.flush()
    lines = written.getvalue().splitlines(keepends=True)
    assert len(lines) == 13
    assert all(line.endswith(b"\n") and not line.endswith(b"\r\n") for line in lines)  # as on other systems


def test_fit_is_stopped_and_resumed_though_files_in_use_stay(files_in_use_stay: list[str], tmp_path: Path) -> None:
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "run"
    model = half_frozen()
    undisturbed = regraft.fit(copy.deepcopy(model), photos, **OPTIONS)
    with pytest.raises(Interrupted):
        regraft.fit(copy.deepcopy(model), photos, out=str(out), progress=StopsAt(2, 2), **OPTIONS)
    resumed = regraft.fit(model, photos, out=str(out), resume=True, **OPTIONS)
    assert_same(resumed, undisturbed)
    assert {file.name for file in out.iterdir()} - {"run.lock"} == {"config.toml", "metrics.csv", "model.safetensors"}
    assert [call for call in files_in_use_stay if not call.endswith("run.lock")] == []


def test_save_writes_over_the_checkpoint_that_was_loaded(files_in_use_stay: list[str], tmp_path: Path) -> None:
    path = regraft.save(tiny.build("sequential"), tmp_path / "model.safetensors")
    model = regraft.load(path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    regraft.save(model, path)
    regraft.load_weights(tiny.build("sequential"), path)
    assert regraft.diff(regraft.save(model, path), model).identical
    assert files_in_use_stay == []


@pytest.mark.usefixtures("files_in_use_stay")
def test_store_keeps_an_entry_in_use_whole_and_drops_it_later(tmp_path: Path) -> None:
    stored, tensor = disk_tensor(tmp_path)
    store = Store(tmp_path, limit_bytes=0)
    store.make_room(1)
    assert (tmp_path / "key" / ENTRY).exists()
    assert identical(stored[2:5], tensor[2:5])
    del stored
    store.make_room(1)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, signal, sys
import torch, torchvision, timm, sklearn, filelock, platformdirs, psutil  # these look for what their system has
for module, names in ((os, {os_names}), (signal, {signal_names})):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None

from pathlib import Path
import importlib
import pytest
these = importlib.import_module("test_other_systems")
with pytest.MonkeyPatch.context() as patch:
    these.test_fit_needs_no_call_of_one_system(patch, Path.cwd())
"""


@pytest.mark.slow  # another process imports torch
def test_other_systems_can_import_and_train(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    code = SCRIPT.format(os_names=HIDDEN_OF_OS, signal_names=HIDDEN_OF_SIGNAL)
    paths = [str(tests.parent / "src"), str(tests), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
