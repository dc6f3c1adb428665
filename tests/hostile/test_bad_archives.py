"""Pickles and zip files that claim a little more than they may, or name what is not allowed, are refused unread."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import regraft
from regraft.errors import CheckpointError
from scene import nothing_written


def with_pickle(change: Callable[[bytes], bytes]) -> bytes:
    """Return a file of torch with another pickle in it."""
    buffer, changed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            raw = before.read(name)
            after.writestr(name, change(raw) if name.endswith("data.pkl") else raw)
    return changed.getvalue()


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        assert raw.count(old) == 1
        return raw.replace(old, new)

    return change


DOUBLED = b"\x80\x02})" + b"q\x00h\x00\x86" * 19 + b"K\x01s."  # {((…, …), (…, …)): 1}, just over 1,000,000 values
PICKLES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a storage longer than its bytes": (replaced(b"K\x02tq", b"K\x03tq"), "claims 3 × 4 bytes of 8"),
    "a view larger than its storage": (replaced(b"K\x02\x85", b"K\x03\x85"), "cannot be read as weights"),
    "a number said more often than is allowed": (
        lambda raw: replaced(b"K\x02\x85", b"J\x01\x00\x04\x00\x85")(replaced(b"K\x01\x85", b"K\x00\x85")(raw)),
        "takes 1,048,580 bytes, and 8 are stored",
    ),
    "tuples within tuples": (lambda raw: DOUBLED, "it nests values "),
    "a tower of tuples": (lambda raw: b"\x80\x02})" + b"\x85" * 51 + b"K\x01s.", "it nests values 51 deep"),
    "another encoding": (
        lambda raw: b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00ascii\x86R.",
        "it calls _codecs.encode for another encoding than latin1",
    ),
    "another class": (
        lambda raw: b"\x80\x02cbuiltins\nbytearray\nK\x08\x85R.",
        "holds more than tensors (builtins.bytearray)",
    ),
    "a dict that holds itself": (
        lambda raw: b"\x80\x02}q\x63(X\x0a\x00\x00\x00state_dicth\x63u.",
        "holds no state dict",
    ),
    "a name of 1,001 characters": (
        lambda raw: b"\x80\x02c" + b"a" * 500 + b"\n" + b"b" * 500 + b"\n)R.",
        "it names something of 1,001 characters",
    ),
    "no pickle": (lambda raw: b"\x80\x02" + b"\xff" * 9, "no pickle that holds tensors"),
}


def test_load_weights_reads_one_number_with_an_endless_stride(workplace: Path) -> None:
    torch.save({"weight": torch.ones(1).as_strided((1, 1), (2**40, 2**40))}, "strided.pt")
    assert regraft.diff("strided.pt", "strided.pt").identical
    model = nn.Linear(1, 1, bias=False)
    regraft.load_weights(model, "strided.pt")
    assert model.weight.item() == 1


def test_load_weights_refuses_a_zip_file_that_says_it_is_one_of_several(workplace: Path) -> None:
    torch.save({"weight": torch.ones(1, 1)}, "split.pt")
    content = bytearray(Path("split.pt").read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2  # the number of disks
    Path("split.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        regraft.load_weights(nn.Linear(1, 1), "split.pt")


def test_checkpoint_error_cuts_a_message_that_quotes_a_page_in_its_middle() -> None:
    message = str(CheckpointError(f"the name '{'a' * 20_000}' is no name. Get the file again."))
    assert len(message) < 4_000
    assert message.startswith("the name 'aaa")
    assert message.endswith("aaa' is no name. Get the file again.")
    assert str(CheckpointError("b" * 3_000)) == "b" * 3_000


@pytest.mark.parametrize("case", PICKLES)
def test_load_weights_refuses_a_hostile_pickle(case: str, workplace: Path) -> None:
    change, message = PICKLES[case]
    Path("hostile.pt").write_bytes(with_pickle(change))
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.clone()
    with pytest.raises(CheckpointError) as caught:
        regraft.load_weights(model, "hostile.pt")
    assert message in str(caught.value)
    assert torch.equal(model.weight, before)


def archive(*entries: tuple[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", packing) as opened:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            opened.writestr(zipfile.ZipInfo(name), content, packing)
    return buffer.getvalue()


def claiming(size: int) -> bytes:
    """Return an archive whose list of entries says that a packed one is so large."""
    raw = bytearray(archive(("a.npy", bytes(1000)), packing=zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", raw, raw.rindex(b"PK\x01\x02") + 24, size)
    return bytes(raw)


NPY = b"\x93NUMPY\x01\x00\x46\x00{'descr': '%s', 'fortran_order': False, 'shape': (%s,), }"
ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "packed": (
        lambda: archive(("archive/data.pkl", bytes(1000)), packing=zipfile.ZIP_DEFLATED),
        "'archive/data.pkl' is compressed, which torch never does",
    ),
    "a claim of 210 MB": (
        lambda: claiming(210_000_000),
        "takes 210,000,000 bytes unpacked, and ",
    ),
    "a name that leads out": (lambda: archive(("../a.npy", b"")), "has an entry '../a.npy', whose name leads out"),
    "an absolute name": (lambda: archive(("/a/data.pkl", b"")), "has an entry '/a/data.pkl', whose name leads out"),
    "the same name twice": (
        lambda: archive(("a/data.pkl", b"1"), ("a/data.pkl", b"2")),
        "it has the entry 'a/data.pkl' twice",
    ),
    "objects": (
        lambda: archive(("a.npy", (NPY % (b"|O", b"2")).ljust(79) + b"\n")),
        "holds Python objects in 'a.npy'",
    ),
    "an array without its numbers": (
        lambda: archive(("a.npy", (NPY % (b"<f4", b"99")).ljust(79) + b"\n")),
        "'a.npy' has the shape",
    ),
    "half a file": (lambda: archive(("a/data.pkl", b"1" * 99))[:150], "it is no whole zip file"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_load_weights_refuses_a_hostile_archive(case: str, workplace: Path) -> None:
    make, message = ARCHIVES[case]
    Path("hostile.pt").write_bytes(make())
    with nothing_written(), pytest.raises(CheckpointError) as caught:
        regraft.load_weights(nn.Linear(2, 1), "hostile.pt")
    assert message in str(caught.value)
