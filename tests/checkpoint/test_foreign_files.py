"""Kinds of files that others write: each is read by a second, independent way, and none of them runs code."""

import io
import json
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import SmallResNet, seeded
from safetensors.torch import save_file
from torch import nn

import tiny
from marking import Marked
from oracles import identical, same, snapshot
from regraft import load_weights
from regraft.checkpoint.any_file import read_state_dicts, read_tensors
from regraft.checkpoint.foreign.reading import kind_of
from regraft.errors import CheckpointError


def state(seed: int = 3) -> dict[str, torch.Tensor]:
    return seeded(SmallResNet, seed).state_dict()


def script(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.trace(model.eval(), torch.rand(1, 3, 8, 8)), path)
    return path


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(identical(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [name for name in tiny.IMAGE_NETS if name != "root-token"])
def test_read_tensors_reads_a_torchscript_archive_as_torch_does(name: str, tmp_path: Path) -> None:
    path = script(tiny.build(name, seed=3), tmp_path / "w.pt")
    assert kind_of(path) == "torchscript"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = torch.jit.load(path).state_dict()
    found, notes = read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(identical(found[key], expected[key]) for key in expected)
    assert notes == ["read from a TorchScript archive; its code was not run"]


def test_load_weights_does_not_even_compile_code_of_a_torchscript_archive(tmp_path: Path) -> None:
    path = script(seeded(SmallResNet, 3), tmp_path / "w.pt")
    broken = tmp_path / "broken.pt"
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(broken, "w") as after:
        for info in before.infolist():
            is_code = "/code/" in info.filename
            after.writestr(info.filename, b"this is no code" if is_code else before.read(info))
    assert load_weights(SmallResNet(), broken, strict=True).share == 1.0


def test_read_state_dicts_calls_nothing_in_a_pickle_of_a_torchscript_archive(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"weight": Marked(tmp_path / "it ran")}, protocol=2))
        archive.writestr("w/constants.pkl", pickle.dumps(()))
        archive.writestr("w/code/net.py", b"")
    with pytest.raises(CheckpointError, match="without parameters or buffers"):
        read_state_dicts(path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", tiny.ALL)
def test_read_state_dicts_gives_tensors_of_a_whole_module_without_its_class(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    model = tiny.build(name, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older files hold the source of the class, which torch may not find
        torch.save(model, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    (entry,) = read_state_dicts(tmp_path / "w.pt", tensors_only=True).entries
    assert_same_tensors(entry.tensors, model.state_dict())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_read_state_dicts_takes_tensors_out_beside_what_would_run(legacy: bool, tmp_path: Path) -> None:
    content = {"args": Marked(tmp_path / "it ran"), "model": state(), "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(posix.mkdir\).*--tensors-only"):
        read_state_dicts(tmp_path / "w.pt")
    found = read_state_dicts(tmp_path / "w.pt", tensors_only=True)
    assert [entry.key for entry in found.entries] == ["model"]
    assert_same_tensors(found.entries[0].tensors, state())
    assert not (tmp_path / "it ran").exists()


def assembled(text: str) -> bytes:
    """Assemble a pickle from opcodes in words, one in a line."""
    codes = {code.name: code.code.encode("latin1") for code in pickletools.opcodes}
    made = b"\x80\x02"
    for line in text.strip().splitlines():
        name, *words = line.split()
        made += (
            codes[name]
            + ("\n".join(words) + "\n" if name == "GLOBAL" else " ".join(words) + "\n" * bool(words)).encode()
        )
    return made + b"."


INSTRUCTIONS = {
    "a state for a known function": "GLOBAL torch._utils _rebuild_tensor_v2\nEMPTY_DICT\nBUILD",
    "a call": "GLOBAL posix mkdir\nMARK\nSTRING 'it_ran'\nTUPLE\nREDUCE",
    "a call of what a call returns": (
        "GLOBAL posix mkdir\nMARK\nSTRING 'it_ran'\nTUPLE\nREDUCE\nMARK\nSTRING 'x'\nTUPLE\nREDUCE"
    ),
    "an object of a class": "GLOBAL marking Marked\nMARK\nSTRING 'it_ran'\nTUPLE\nNEWOBJ",
    "a reference that is no storage": "STRING 'x'\nBINPERSID",
    "nothing on the stack": "REDUCE",
}


@pytest.mark.parametrize("text", INSTRUCTIONS.values(), ids=list(INSTRUCTIONS))
def test_read_state_dicts_runs_no_instruction(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = assembled(text)
    with zipfile.ZipFile("w.pt", "w") as archive:
        archive.writestr("w/data.pkl", raw)
    with pytest.raises(CheckpointError):
        read_state_dicts(Path("w.pt"), tensors_only=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w.pt"]


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((4,), (1,), 1), ((5,), (0,), 0), ((2, 2), (-1, 1), 0), ((2,), (5,), 0), (("4",), (1,), 0)],
    ids=["beyond the end", "one number more often than there are numbers", "negative stride", "far away", "no number"],
)
def test_read_state_dicts_refuses_a_tensor_outside_of_its_storage(
    size: tuple[Any, ...], stride: tuple[int, ...], offset: int, tmp_path: Path
) -> None:
    class Rebuilt:
        def __reduce__(self) -> tuple[object, ...]:
            storage = torch.UntypedStorage(16)
            arguments = (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),)
            return torch._utils._rebuild_tensor_v2, (*arguments, offset, size, stride, False, {})

    torch.save({"weight": Rebuilt()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_state_dicts(tmp_path / "w.pt", tensors_only=True)


def test_read_state_dicts_reads_arrays_of_numbers_and_names_others(tmp_path: Path) -> None:
    arrays = {
        "weight": np.arange(6, dtype=">f4").reshape(2, 3),
        "bias": np.ones(2, np.float64)[::-1],
        "steps": np.int64(3),
        "mask": np.array([True, False]),
        "author": np.array("me"),
    }
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    found = read_state_dicts(tmp_path / "w.npz")
    assert found.left_out == ("author",)
    tensors = found.entries[0].tensors
    assert list(tensors) == ["weight", "bias", "steps", "mask"]
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.numpy(), arrays[name])
    assert tensors["weight"].dtype == torch.float32


def test_read_state_dicts_does_not_unpickle_objects_in_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.array([Marked(tmp_path / "it ran")], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"reading them would run code from it"):
        read_state_dicts(tmp_path / "w.npz")
    assert not (tmp_path / "it ran").exists()


def in_parts(folder: Path, kind: str = "safetensors") -> Path:
    """Write a model as Hugging Face does, in two parts with an index."""
    tensors = state()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    parts = {f"{stem}-0000{k + 1}-of-00002.{kind}": list(tensors)[k::2] for k in range(2)}
    for file, names in parts.items():
        held = {name: tensors[name] for name in names}
        save_file(held, folder / file) if kind == "safetensors" else torch.save(held, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    path = folder / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_load_weights_reads_a_model_in_parts_as_one(kind: str, by_folder: bool, tmp_path: Path) -> None:
    path = in_parts(tmp_path, kind)
    model = SmallResNet()
    load_weights(model, tmp_path if by_folder else path, strict=True)
    assert all(identical(model.state_dict()[name], tensor) for name, tensor in state().items())


OUTSIDE = [
    "../w.safetensors",
    "/w.safetensors",
    "sub/w.safetensors",
    "..",
    ".",
    "C:\\w",
    "file:///w",
    "https://x/w",
    "",
    5,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_read_state_dicts_follows_an_index_to_files_beside_it_and_nothing_else(name: Any, tmp_path: Path) -> None:
    (tmp_path / "inner" / "sub").mkdir(parents=True)
    for place in ("w.safetensors", "inner/sub/w.safetensors"):
        save_file(state(), tmp_path / place)
    path = in_parts(tmp_path / "inner")
    index = json.loads(path.read_text())
    index["weight_map"]["conv1.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is no plain file name"):
        read_state_dicts(path)


def without_part(path: Path) -> None:
    next(path.parent.glob("*00002-of*")).unlink()


def with_wrong_place(path: Path) -> None:
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["conv1.weight"] = files[1]
    path.write_text(json.dumps(index))


def naming_itself(path: Path) -> None:
    index = json.loads(path.read_text())
    index["weight_map"]["conv1.weight"] = path.name
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_part, "which is not beside it. Get the whole set"),
        (with_wrong_place, "holds 'conv1.weight', which it lacks"),
        (naming_itself, "which is an index as well"),
        (lambda path: path.write_text("{"), "is no index of weights: JSONDecodeError"),
        (lambda path: path.write_text("[]"), "is no index of weights: TypeError"),
        (lambda path: path.write_text('{"weight_map": {}}'), "its weight_map is empty or no object"),
        (lambda path: path.write_text('{"weight_map": [1]}'), "its weight_map is empty or no object"),
        (lambda path: path.write_text("[" * 1_100), "is no index of weights: "),
    ],
)
def test_load_weights_refuses_a_damaged_index(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = in_parts(tmp_path)
    damage(path)
    model = SmallResNet()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, path)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("kind", ["zip", "legacy", "torchscript", "npz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_read_state_dicts_refuses_a_file_that_is_cut_off(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "w"
    if kind == "torchscript":
        script(seeded(SmallResNet, 3), path)
    elif kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in state().items()})
        path.write_bytes(buffer.getvalue())
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    for options in ({}, {"tensors_only": True}):
        with pytest.raises(CheckpointError):
            read_state_dicts(path, **options)


def test_load_weights_lists_several_networks_that_fit_equally_well(tmp_path: Path) -> None:
    torch.save({"student": state(1), "teacher": state(2)}, tmp_path / "w.pt")
    model = SmallResNet()
    with pytest.raises(CheckpointError, match=r"'student' \(63 tensors\), 'teacher' \(63 tensors\).*100%, 100%"):
        load_weights(model, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt", entry="teacher", strict=True)
    assert all(identical(model.state_dict()[name], tensor) for name, tensor in state(2).items())
    with pytest.raises(CheckpointError, match="holds several state dicts"):
        read_tensors(tmp_path / "w.pt")


def test_load_weights_finds_an_average_of_lightning_by_its_key(tmp_path: Path) -> None:
    callbacks = {"EMA": {"ema_state_dict": state(2), "step": 3}, "Stop": {"best": {"score": torch.tensor(1.0)}}}
    torch.save({"state_dict": state(1), "callbacks": callbacks}, tmp_path / "w.ckpt")
    assert [entry.key for entry in read_state_dicts(tmp_path / "w.ckpt").entries] == [
        "state_dict",
        "callbacks.EMA.ema_state_dict",
    ]
    model = SmallResNet()
    load_weights(model, tmp_path / "w.ckpt", entry="EMA", strict=True)
    assert all(identical(model.state_dict()[name], tensor) for name, tensor in state(2).items())
