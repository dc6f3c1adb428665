"""Plain data with tensors goes into a file and comes back as it was; a damaged file is noticed."""

import contextlib
import errno
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import identical
from regraft.checkpoint.file.tree import read_tree, snapshot, write_tree
from regraft.errors import CheckpointError, RunError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]

tensors = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return identical(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@settings(max_examples=150, deadline=None)
@given(trees)
def test_read_tree_reads_what_write_tree_wrote(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    write_tree(tree, path)
    assert equal(read_tree(path), tree)
    assert equal(snapshot(tree), tree)


def test_write_tree_keeps_numbers_that_json_lacks_and_names_that_collide(tmp_path: Path) -> None:
    tree = {"a": {"b": torch.ones(1)}, "a/b": torch.zeros(2), 1: math.inf, "1": -math.inf, "r": random.getstate()}
    write_tree(tree, tmp_path / "x")
    assert equal(read_tree(tmp_path / "x"), tree)
    write_tree({"x": math.nan}, tmp_path / "x")
    assert math.isnan(read_tree(tmp_path / "x")["x"])


@pytest.mark.parametrize("kind", ["channels last", "transposed", "a slice", "expanded", "shared"])
def test_write_tree_keeps_how_a_tensor_lies_in_memory(kind: str, tmp_path: Path) -> None:
    made = {
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
        "a slice": torch.randn(4, 4)[:, :2],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "shared": torch.randn(4),
    }[kind]
    write_tree([made, made], tmp_path / "x")
    first, second = read_tree(tmp_path / "x")
    assert identical(first, made)
    assert identical(second, made)
    if kind in ("channels last", "transposed"):
        assert first.stride() == made.stride() == snapshot(made).stride()


@pytest.mark.parametrize("value", [{1.5: 0}, {True: 0}, {"a": [object()]}, {1, 2}, torch.nn.Linear(1, 1), b"bytes"])
def test_write_tree_refuses_what_is_no_plain_data(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"which is no plain data|expected a str or an int"):
        write_tree({"state": value}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_read_tree_notices_every_changed_byte(tmp_path: Path) -> None:
    path, tree = tmp_path / "x", {"weight": torch.arange(6.0), "steps": [1, 2.5, "text"]}
    write_tree(tree, path)
    whole, unnoticed = path.read_bytes(), 0
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):  # but for the padding of the header, which says nothing
            assert equal(read_tree(path), tree), position
            unnoticed += 1
    assert unnoticed <= 8
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            read_tree(path)
    with pytest.raises(CheckpointError, match="no file"):
        read_tree(tmp_path / "nowhere")


@pytest.mark.parametrize("place", ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.replace"])
def test_write_tree_leaves_the_file_before_where_the_disk_is_full(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_tree({"a": 1}, path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    with pytest.raises(RunError, match=r"cannot write '.*x': .*No space left on device.* Free some space"):
        write_tree({"a": 2}, path)
    monkeypatch.undo()
    assert read_tree(path) == {"a": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["x"]
