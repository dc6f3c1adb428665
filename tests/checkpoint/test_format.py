"""The format as its page specifies it: read with the standard library alone, and with the plain safetensors library."""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import tiny
from checkpoint.altered import rewritten
from oracles import identical
from regraft import create_model, load, save
from regraft.card import Card, Preprocessing, Recipe, Source, Step, attach
from regraft.checkpoint import Header, load_outline, read_header
from regraft.checkpoint.file.contents import read_contents
from regraft.checkpoint.file.digest import tensor_digest
from regraft.checkpoint.file.layout import DTYPES, read_layout, read_start
from regraft.checkpoint.file.opening import OpenCheckpoint
from regraft.errors import CheckpointError, RegraftError

PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text()
NUMPY = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "?", "U8": "u1"}


def table(section: str, column: str) -> dict[str, list[str]]:
    """Read a table of the page: the first one whose head begins with `column`, below a heading."""
    below = PAGE[PAGE.index(f"## {section}\n") :]
    rows = below[below.index(f"| {column} |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


class Mixed(nn.Module):
    """Every kind of tensor that the page names, scalars, empty ones and tied ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        for name, dtype in DTYPES.items():
            self.register_buffer(f"of_{name}", torch.arange(7 * dtype.itemsize, dtype=torch.uint8).view(dtype))
        self.of_BOOL = torch.tensor([True, False])
        self.register_buffer("scalar", torch.tensor(-3))
        self.register_buffer("nothing", torch.empty(0, 4))


def read_by_hand(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[int], bytes]]]:
    """Read a file as `docs/format.md` says, with nothing of regraft, torch or safetensors."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    content = json.loads(raw[8 : 8 + length].decode("utf-8"))
    document = json.loads(content.pop("__metadata__")["regraft"])
    data, end = raw[8 + length :], 0
    tensors = {}
    for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == end
        end = stop
        tensors[name] = (entry["dtype"], entry["shape"], data[start:stop])
    assert end == len(data)
    return document, tensors


def digest_by_hand(dtype: str, shape: list[int], raw: bytes) -> str:
    known = table("A file", "dtype")[dtype]
    if dtype == "F4":  # two numbers in a byte
        shape = [*shape[:-1], shape[-1] // 2]
    assert len(raw) == math.prod(shape) * int(known[1])
    inside = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    return hashlib.sha256(f"{known[0]}({inside})".encode("ascii") + raw).hexdigest()


def test_save_writes_what_a_reader_written_from_the_page_verifies(tmp_path: Path) -> None:
    model = Mixed()
    path = save(model, tmp_path / "mixed.safetensors")
    document, tensors = read_by_hand(path)
    assert document["format"] == "1.0"
    assert document["shared"] == {"second.weight": "first.weight"}
    assert {name: digest_by_hand(*found) for name, found in tensors.items()} == document["digests"]
    state = model.state_dict()
    assert set(tensors) | set(document["shared"]) == set(state)
    for name, (dtype, shape, raw) in tensors.items():
        assert raw == bytes(state[name].contiguous().reshape(-1).view(torch.uint8).numpy())
        if dtype in NUMPY and dtype != "BF16":
            assert np.array_equal(np.frombuffer(raw, NUMPY[dtype]).reshape(shape), state[name].numpy())
    lines = "".join(f"{name} {document['digests'][name]}\n" for name in sorted(document["digests"]))
    header = read_header(path)
    assert header is not None
    assert header.digest() == hashlib.sha256(lines.encode()).hexdigest()


def test_header_fields_and_dtypes_are_all_named_on_the_page() -> None:
    assert set(table("The document", "field")) == set(Header.model_fields)
    card = PAGE[PAGE.index("`card` has these fields") :]
    fields = re.findall(r"^\| `(\w+)` \|", card.partition("\n\n`recipe.source`")[0], re.MULTILINE)
    assert set(fields) == set(Card.model_fields) - {"carried", "origin"}
    assert set(re.findall(r"`(\w+)`", table("The document", "field")["card"][1])) <= set(Card.model_fields)
    dtypes = {name: (row[0], int(row[1])) for name, row in table("A file", "dtype").items()}
    assert dtypes == {name: (str(dtype), dtype.itemsize) for name, dtype in DTYPES.items()}


def test_save_writes_what_the_plain_library_reads(tmp_path: Path) -> None:
    model = Mixed()
    path = save(model, tmp_path / "mixed.safetensors")
    found = safetensors.torch.load_file(path)
    assert all(identical(tensor, model.state_dict()[name]) for name, tensor in found.items())
    assert set(found) == set(model.state_dict()) - {"second.weight"}
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["regraft"]


def test_read_layout_is_the_same_for_files_of_the_plain_library(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    state = {name: tensor.clone() for name, tensor in Mixed().state_dict().items()}
    safetensors.torch.save_file(state, path)
    found = read_layout(path)
    assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()
    }


def described(model: nn.Module) -> nn.Module:
    return attach(
        model,
        preprocessing=Preprocessing(size=8, resize=8),
        recipe=Recipe(source=Source(name="resnet18"), steps=(Step(operation="replace_head", arguments={"new": 3}),)),
    )


NOVELTIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "document": lambda document: document,
    "card": lambda document: document["card"],
    "preprocessing": lambda document: document["card"]["preprocessing"],
    "recipe": lambda document: document["card"]["recipe"],
    "source": lambda document: document["card"]["recipe"]["source"],
    "step": lambda document: document["card"]["recipe"]["steps"][0],
}


def test_save_writes_fields_again_that_it_does_not_know(tmp_path: Path) -> None:
    model = described(create_model("resnet18", weights="none", num_classes=3))
    novelty = {"a": [1, None, {"b": "ü"}], "none": None}

    def add(document: dict[str, Any]) -> None:
        for place in NOVELTIES.values():
            place(document)["novelty"] = novelty
        document["format"] = "1.7"

    path = rewritten(save(model, tmp_path / "new.safetensors"), add)
    again = read_by_hand(save(load(path), tmp_path / "again.safetensors"))[0]
    twice = read_by_hand(save(load(tmp_path / "again.safetensors"), tmp_path / "twice.safetensors"))[0]
    for document in (again, twice):
        assert {name: place(document).get("novelty") for name, place in NOVELTIES.items()} == dict.fromkeys(
            NOVELTIES, novelty
        )
        assert document["format"] == "1.0"
    assert "novelty" not in read_by_hand(save(model, tmp_path / "other.safetensors"))[0]


def test_read_header_refuses_a_field_of_another_type(tmp_path: Path) -> None:
    path = save(tiny.build("sequential"), tmp_path / "model.safetensors")
    for name, value in {"digests": [1], "frozen": "a", "shared": {"a": 1}, "base": "b", "whole": "zz"}.items():
        known = path.read_bytes()
        rewritten(path, lambda document, name=name, value=value: document.update({name: value}))
        with pytest.raises(CheckpointError, match=rf"does not fit the format 1\.0: {name}"):
            read_header(path)
        path.write_bytes(known)


@pytest.mark.parametrize("kind", ["a digest is missing", "a digest too many"])
def test_save_writes_a_digest_of_every_tensor_that_load_checks(kind: str, tmp_path: Path) -> None:
    path = save(tiny.build("sequential"), tmp_path / "model.safetensors")

    def change(document: dict[str, Any]) -> None:
        if kind == "a digest is missing":
            del document["digests"]["7.bias"]
        else:
            document["digests"]["8.bias"] = "0" * 64

    name = "7.bias" if kind == "a digest is missing" else "8.bias"
    with pytest.raises(CheckpointError, match=rf"is damaged: .*'{name}'"):
        load(rewritten(path, change))


@pytest.mark.parametrize(
    "shared",
    [{"7.weight": "7.bias"}, {"new": "nowhere"}, {"new": "7.bias"}, {"1.weight": "1.running_mean"}],
    ids=["two stored ones", "a name that is not there", "a name that no layer has", "a parameter and a buffer"],
)
def test_load_refuses_names_that_share_what_they_cannot_share(shared: dict[str, str], tmp_path: Path) -> None:
    model = tiny.build("sequential")
    path = save(model, tmp_path / "model.safetensors")
    if "1.weight" in shared:
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "1.weight"}
        metadata = {"regraft": read_start(path)[0]["__metadata__"]["regraft"]}
        safetensors.torch.save_file(state, path, metadata)
        rewritten(path, lambda document: document["digests"].pop("1.weight"))
    rewritten(path, lambda document: document.update(shared=shared))
    for attempt in (load, load_outline) if "new" not in shared else (load,):
        if shared == {"7.weight": "7.bias"} and attempt is load_outline:
            continue
        with pytest.raises(CheckpointError, match=r"is damaged: |does not match its own recipe"):
            attempt(path)


def test_load_refuses_whole_numbers_for_weights(tmp_path: Path) -> None:
    model = tiny.build("sequential")
    path = save(model, tmp_path / "model.safetensors")
    state = {**model.state_dict(), "7.bias": torch.arange(5)}
    safetensors.torch.save_file(state, path, {"regraft": read_start(path)[0]["__metadata__"]["regraft"]})
    digest = tensor_digest(state["7.bias"])
    rewritten(path, lambda document: document["digests"].update({"7.bias": digest}))
    for attempt in (load, load_outline):
        with pytest.raises(CheckpointError, match=r"at '7\.bias': torch\.int64 in the file"):
            attempt(path)


def test_save_refuses_a_header_that_nobody_would_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"at most 32,000,000 are read.*Nothing was written"):
        save(tiny.build("sequential"), tmp_path / "model.safetensors", metadata={"log": "x" * 32_000_001})
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_metadata_that_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no JSON data: .*Nothing was written"):
        save(tiny.build("sequential"), tmp_path / "model.safetensors", metadata={"model": nn.ReLU()})
    assert list(tmp_path.iterdir()) == []


def test_read_contents_takes_no_memory_for_a_hole_that_is_larger_than_any(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": entry(shape=[2**50], offsets=[0, 2**52])})
    try:
        os.truncate(path, path.stat().st_size + 2**52)
    except OSError as error:
        pytest.skip(f"no such files here: {error}")
    with OpenCheckpoint(path) as checkpoint, pytest.raises(CheckpointError, match="for which there is no memory"):
        read_contents(checkpoint)


def written(tmp_path: Path, content: object, data: bytes = b"") -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LAYOUTS: dict[str, tuple[object, bytes]] = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8)),
    "more bytes than tensors": ({"a": entry()}, bytes(9)),
    "fewer bytes than tensors": ({"a": entry()}, bytes(7)),
    "a huge shape": ({"a": entry(shape=[2**40, 2**40], offsets=[0, 2**82])}, bytes(8)),
    "a shape that is too large for any file": ({"a": entry(shape=[2**64, 0], offsets=[0, 0])}, b""),
    "a negative shape": ({"a": entry(shape=[-2, -1])}, bytes(8)),
    "a shape of words": ({"a": entry(shape=["2"])}, bytes(8)),
    "true for a size": ({"a": entry(shape=[True, 2])}, bytes(8)),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8)),
    "an unknown dtype": ({"a": entry(dtype="Q7")}, bytes(8)),
    "another dtype": ({"a": entry(dtype="F64")}, bytes(8)),
    "a list for a dtype": ({"a": entry(dtype=["F32"])}, bytes(8)),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a number for a tensor": ({"a": 3}, bytes(8)),
    "65 dimensions": ({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)),
    "a list": ([1], b""),
    "deep": (b"[" * 1_100 + b"]" * 1_100, b""),
    "deep objects": (b'{"a":' * 1_100, b""),
    "too many values": (b"[" + b"1," * 2_000_001 + b"1]", b""),
    "a number of many digits": (b'{"a": ' + b"9" * 10_000 + b"}", b""),
    "no text": (b'{"\xff": 1}', b""),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_read_layout_refuses_a_layout_that_is_not_sound(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, *LAYOUTS[case])
    with pytest.raises(CheckpointError, match=r"bad\.safetensors' is (damaged|no safetensors file)"):
        read_layout(path)
    with pytest.raises(RegraftError):
        load(path)
