"""A checkpoint in several files is whole or absent, whenever its save is cut short, and leads nowhere else."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import tiny
from checkpoint.altered import assert_equal, shake
from oracles import identical
from regraft import create_model, diff, load, save
from regraft.checkpoint import read_header
from regraft.checkpoint.file import opening, shards
from regraft.errors import CheckpointError, RunError

INDEX = "model.safetensors.index.json"
LIMIT = 400  # bytes: the tiny network's tensors take 2,120


def network(seed: int = 0) -> nn.Module:
    return shake(tiny.build("sequential", seed))


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_save_in_several_files_is_bit_equal(tmp_path: Path) -> None:
    model = network()
    index = save(model, tmp_path / "model.safetensors", shard_bytes=LIMIT, metadata={"note": "mine"})
    assert index == tmp_path / INDEX
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    for place in (index, tmp_path, tmp_path / "model.safetensors"):
        assert_equal(load(place), model)
        assert read_header(place).metadata == {"note": "mine"}
    assert diff(index, model).identical
    single = save(model, tmp_path / "single.safetensors")
    assert read_header(single).digest() == read_header(index).digest()


def test_save_writes_the_index_of_other_libraries(tmp_path: Path) -> None:
    model = network()
    index = save(model, tmp_path / "model.safetensors", shard_bytes=LIMIT)
    content = json.loads(index.read_text())
    state = model.state_dict()
    assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    found = {name: safetensors.torch.load_file(tmp_path / file)[name] for name, file in content["weight_map"].items()}
    assert found.keys() == state.keys()
    assert all(identical(tensor, state[name]) for name, tensor in found.items())
    largest = max(tensor.nbytes for tensor in state.values())
    for file in set(content["weight_map"].values()):
        assert sum(tensor.nbytes for tensor in safetensors.torch.load_file(tmp_path / file).values()) <= max(
            LIMIT, largest
        )


def test_save_in_several_files_keeps_tied_weights_and_flags(own: str, tmp_path: Path) -> None:
    model = create_model(own, trust_code=True)
    model.body.bias.requires_grad_(False)
    loaded = load(save(model, tmp_path / "model.safetensors", shard_bytes=100), trust_code=True)
    assert loaded.twin.weight is loaded.body.weight
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert_equal(loaded, model)


@pytest.mark.parametrize("previous", ["none", "one file", "several files", "several, sizes differ"])
@pytest.mark.parametrize("next_limit", [LIMIT, 10**9])
def test_save_that_is_cut_short_at_any_moment_leaves_the_old_one_whole(
    previous: str, next_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    old, new = network(), network(seed=1)
    limits = {"one file": 10**9, "several files": LIMIT, "several, sizes differ": 900}
    kept = save(old, path, shard_bytes=limits[previous]) if previous != "none" else None
    before = listing(tmp_path)

    for killed in (False, True):  # an error that is caught, and a process that dies and cleans up nothing
        for moment in itertools.count():
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", failing_after(moment))
                if killed:
                    patch.setattr(shards, "_remove", lambda files: None)
                try:
                    saved = save(new, path, shard_bytes=next_limit)
                    break
                except RunError:
                    now = listing(tmp_path)
            assert (now.items() >= before.items()) if killed else (now == before)
            if kept is not None:
                assert_equal(load(kept), old)
        assert moment == (len(names_in(saved)) + 1 if next_limit == LIMIT else 1)
        assert_equal(load(saved), new)
        saved = save(new, path, shard_bytes=next_limit)  # which removes what the dead one left
        assert {file.name for file in tmp_path.iterdir()} == {saved.name, *names_in(saved)}
        for file in tmp_path.iterdir():
            file.unlink()
        for name, raw in before.items():
            (tmp_path / name).write_bytes(raw)


def failing_after(count: int) -> Callable[[Path, Path], Path]:
    """Make renaming fail once it has worked so many times: the moments in which a save can be cut short."""
    left, rename = itertools.count(count, -1), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if next(left) <= 0:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    return replace


def names_in(index: Path) -> set[str]:
    return set(json.loads(index.read_text())["weight_map"].values()) if index.name == INDEX else set()


def test_save_puts_one_file_in_the_place_of_several_and_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for seed, limit in enumerate((LIMIT, 10**9, 900, 900, LIMIT)):
        model = network(seed)
        saved = save(model, path, shard_bytes=limit)
        assert {file.name for file in tmp_path.iterdir()} == {saved.name, *names_in(saved)}
        for place in (saved, path):
            assert_equal(load(place), model)


def test_save_leaves_files_of_others_with_such_names(tmp_path: Path) -> None:
    theirs = tmp_path / "model-00001-of-00002.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, theirs)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": theirs.name}}))
    before = listing(tmp_path)
    save(network(), tmp_path / "model.safetensors")
    assert {name: raw for name, raw in listing(tmp_path).items() if name in before} == before


def outside(folder: Path) -> str:
    (folder.parent / "outside").mkdir(exist_ok=True)
    return str(folder.parent / "outside" / "stolen.safetensors")


NAMES: dict[str, Callable[[Path], str]] = {
    "up and away": lambda folder: "../outside/stolen.safetensors",
    "absolute": outside,
    "a folder below": lambda folder: "below/stolen.safetensors",
    "backslashes": lambda folder: "..\\outside\\stolen.safetensors",
    "a drive": lambda folder: "C:stolen.safetensors",
    "a link": lambda folder: "link.safetensors",
    "the folder itself": lambda folder: ".",
    "nothing": lambda folder: "",
    "another kind": lambda folder: "shadow",
    "a URL": lambda folder: "https://example.org/stolen.safetensors",
}


@pytest.mark.parametrize("case", NAMES)
def test_load_follows_an_index_nowhere_else(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    index = save(network(), folder / "model.safetensors", shard_bytes=LIMIT)
    first = sorted(folder.glob("*.safetensors"))[0]
    (folder / "below").mkdir()
    for place in (outside(folder), folder / "below" / "stolen.safetensors", folder / "shadow"):
        Path(place).write_bytes(first.read_bytes())
    (folder / "link.safetensors").symlink_to(outside(folder))
    content = json.loads(index.read_text())
    name = NAMES[case](folder)
    content["weight_map"] = {k: name if v == first.name else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    monkeypatch.setattr(shards, "read_start", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(CheckpointError, match=r"expected the plain name of a \.safetensors file beside it"):
        load(index)


def test_load_reads_a_cache_that_links_index_and_files_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    model = network()
    save(model, tmp_path / "blobs" / "model.safetensors", shard_bytes=LIMIT)
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(os.path.join("..", "blobs", file.name))  # noqa: PTH118
    assert_equal(load(tmp_path / "snapshot"), model)


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


def moved(content: dict[str, Any]) -> None:
    names = content["weight_map"]
    first, *_, last = sorted(set(names.values()))
    names.update({name: last for name, file in names.items() if file == first})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no map": (drop("weight_map"), "it has no weight_map"),
    "no metadata": (drop("metadata"), "has tensors but no recipe"),
    "a list": (lambda content: content.update(weight_map=[1]), "it has no weight_map"),
    "numbers": (lambda content: content.update(weight_map={"a": 1}), "it has no weight_map"),
    "one tensor less": (lambda content: content["weight_map"].pop("7.bias"), "'7.bias' is not where it says"),
    "one tensor more": (
        lambda content: content["weight_map"].update(z=content["weight_map"]["7.bias"]),
        "'z' is not where it says",
    ),
    "another file": (moved, "is not where it says"),
    "a newer format": (
        lambda content: content["metadata"].update(regraft='{"format": "2.0"}'),
        "Install a newer regraft",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_load_refuses_an_index_that_does_not_fit(case: str, tmp_path: Path) -> None:
    index = save(network(), tmp_path / "model.safetensors", shard_bytes=LIMIT)
    content = json.loads(index.read_text())
    DAMAGES[case][0](content)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        load(index)
    assert DAMAGES[case][1] in str(caught.value)
    assert str(index) in str(caught.value)


def test_load_names_a_missing_or_damaged_file(tmp_path: Path) -> None:
    index = save(network(), tmp_path / "model.safetensors", shard_bytes=LIMIT)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    raw = second.read_bytes()
    second.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"index\.json' is damaged: '.*' is not what was saved"):
        load(index)
    with pytest.raises(CheckpointError, match=rf"'{first}' is one of several files of a checkpoint\. Load its index"):
        load(first)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"no file '{first}'"):
        load(index)


def test_load_refuses_an_index_that_is_no_json_or_too_long(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    for raw in (b"no json", b"[1]", b"\xff", b"[" * 1_100, b"{" + b" " * 100_000_000 + b"}"):
        index.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"is no index of a checkpoint"):
            load(index)


def test_load_refuses_a_folder_with_several_checkpoints(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(network(), tmp_path / f"{name}.safetensors", shard_bytes=LIMIT)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints \('a\.safetensors\.index\.json', 'b\."):
        load(tmp_path)


def test_load_that_meets_a_save_finds_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    index = save(network(), path, shard_bytes=LIMIT)
    read, new = opening.read_index, network(seed=1)

    def read_and_lose(place: Path) -> dict[str, Any]:
        content = read(place)
        monkeypatch.setattr(opening, "read_index", read)
        save(new, path, shard_bytes=LIMIT)  # removes the files that `content` names
        return content

    monkeypatch.setattr(opening, "read_index", read_and_lose)
    with opening.OpenCheckpoint(index) as checkpoint:
        assert {file.name for file, _ in checkpoint.entries.values()} == names_in(index)
