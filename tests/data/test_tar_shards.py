"""Folders of tar shards → listings, and the bytes of their members."""

import gzip
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from data.shards import numbered, photo, write_shards, write_tar
from regraft.data.folders import list_data, list_labelled
from regraft.data.samples import held_out
from regraft.data.shards.listing import find_member
from regraft.data.shards.tar import TarMember, list_members
from regraft.data.sources import read_bytes, size_of
from regraft.errors import DataError

LONG = "a/" * 60 + "b" * 120 + "/0001.jpg"


def members(shard: Path) -> dict[str, bytes]:
    with shard.open("rb") as file:
        entries = list(list_members(shard, file))
    return {entry.name: TarMember(shard, *entry).read() for entry in entries}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_list_members_finds_what_tarfile_writes(format: int, tmp_path: Path) -> None:
    files = {
        "0001.jpg": b"x" * 512,
        "é/ü 2.png": b"y" * 513,
        "empty/3.cls": b"",
        "b.json": b"{}",
        "p" * 90 + "/q": b"1",
    }
    if format != tarfile.USTAR_FORMAT:
        files[LONG] = b"z"
    shard = write_tar(tmp_path / "a.tar", files, format)
    with tarfile.open(shard) as archive:  # the oracle
        expected = {name: archive.extractfile(name).read() for name in archive.getnames()}  # pyright: ignore
    assert expected == files
    assert members(shard) == files


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
def test_list_members_finds_what_tar_writes_and_passes_over_folders_and_links(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "1.jpg").write_bytes(b"one")
    (tmp_path / "in" / ("n" * 150 + ".jpg")).write_bytes(b"two")
    (tmp_path / "in" / "link.jpg").symlink_to("sub/1.jpg")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path, "in"], check=True)
    assert members(tmp_path / "a.tar") == {"in/sub/1.jpg": b"one", f"in/{'n' * 150}.jpg": b"two"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_list_data_reads_the_shards_that_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for part, count in (("train", 9), ("val", 4)):
        (tmp_path / part).mkdir()
        with webdataset.ShardWriter(f"{tmp_path}/{part}/%06d.tar", maxcount=3, verbose=0) as writer:
            for number in range(count):
                writer.write({"__key__": f"{number:05}", "jpg": photo(number), "cls": number % 2, "json": {"a": 1}})
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    listing = list_data(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert listing.counts() == [("cat", 5, 2), ("dog", 4, 2)]
    assert listing.split == "as found in the shards named train and validation"
    dataset = webdataset.WebDataset([str(path) for path in sorted((tmp_path / "train").iterdir())], shardshuffle=False)
    expected = [(item["jpg"], int(item["cls"])) for item in dataset]
    assert [(read_bytes(sample.path), sample.target) for sample in listing.train] == expected


def test_list_data_splits_shards_without_a_part_and_evaluate_finds_the_draw_again(tmp_path: Path) -> None:
    listing = list_data(write_shards(tmp_path / "a", 20), validation_share=0.25)
    assert listing.counts() == [("0", 15, 5), ("1", 15, 5)]
    write_shards(tmp_path / "elsewhere", 20)
    samples = list_labelled(tmp_path / "elsewhere", listing.classes or ())
    again = held_out(samples, listing.draw)
    assert again is not None
    assert [str(sample.path)[-20:] for sample in again] == [str(sample.path)[-20:] for sample in listing.validation]


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("imagenet-train-000.tar", "imagenet-validation-0.tar"), (8, 6)),
        (("data/train-0.tar", "data/test-0.tar"), (8, 6)),
        (("train/0.tar", "valid/0.tar", "test/0.tar"), (8, 6)),
        (("train-0.tar",), (6, 2)),
    ],
)
def test_list_data_tells_the_parts_by_names(names: tuple[str, ...], counts: tuple[int, int], tmp_path: Path) -> None:
    for name, count in zip(names, (8, 6, 4), strict=False):
        write_tar(tmp_path / name, numbered(count))
    listing = list_data(tmp_path, validation_share=0.25)
    assert (len(listing.train), len(listing.validation)) == counts
    assert listing.split.endswith("without those named test") == (len(names) == 3)


def test_list_data_takes_labels_from_json_and_names_of_classes_from_cls(tmp_path: Path) -> None:
    files = {f"x/{n}.seg.png": b"no photo" for n in range(4)} | {f"x/{n}.PNG": photo(n, "PNG") for n in range(4)}
    labels = ("dog", "cat")
    files |= {f"x/{n}.json": f'{{"label": "{labels[n % 2]}", "width": 3}}'.encode() for n in range(3)}
    files |= {"x/3.cls": b"cat\n", "x/__meta__.json": b"{}", "README.md": b"text"}
    listing = list_data(write_tar(tmp_path / "one.tar", files), validation_share=0.5)
    assert listing.classes == ("cat", "dog")
    assert {str(s.path): s.target for s in listing.train + listing.validation} == {
        f"{tmp_path}/one.tar/x/{n}.PNG": (1, 0)[n % 2] for n in range(4)
    }


def test_read_bytes_of_a_member_from_many_threads(tmp_path: Path) -> None:
    write_shards(tmp_path, 20)
    samples = list_data(tmp_path).train
    wrong = []

    def read(offset: int) -> None:
        for sample in (*samples[offset:], *samples[:offset]):
            if read_bytes(sample.path) != photo(int(str(sample.path)[-8:-4])):
                wrong.append(sample)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(0, 30, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_read_bytes_says_why_a_member_is_gone(tmp_path: Path) -> None:
    sample = list_data(write_shards(tmp_path)).train[-1]
    shard = tmp_path / "000001.tar"
    with shard.open("r+b") as file:
        file.truncate(size_of(sample.path))
    with pytest.raises(DataError, match="the shard was cut off after it was listed"):
        read_bytes(sample.path)
    shard.rename(tmp_path / "b.tar")
    with pytest.raises(DataError, match="no such file"):
        read_bytes(sample.path)


def test_read_bytes_notices_that_a_shard_was_replaced(tmp_path: Path) -> None:
    before = list_data(write_shards(tmp_path)).train[0].path
    assert read_bytes(before) == photo(0)
    other = write_tar(tmp_path / "other", {"0000.jpg": photo(7)} | numbered(3, first=1))
    other.replace(tmp_path / "000000.tar")
    with (tmp_path / "000000.tar").open("rb") as file:
        entry = next(list_members(tmp_path / "000000.tar", file))
    assert read_bytes(TarMember(tmp_path / "000000.tar", *entry)) == photo(7)


def test_find_member_takes_the_text_of_a_member(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", numbered(3))
    assert str(find_member(shard / "0001.jpg")) == f"{shard}/0001.jpg"
    assert find_member(shard / "none.jpg") is None
    assert find_member(tmp_path / "none.tar" / "0001.jpg") is None


def cut(shard: Path, size: int) -> None:
    with shard.open("r+b") as file:
        file.truncate(size)


def change_header(shard: Path, place: int, value: bytes) -> None:
    """Write into the first header of an archive, and mend its sum."""
    content = bytearray(shard.read_bytes())
    content[place : place + len(value)] = value
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    shard.write_bytes(content)


def case(name: str, root: Path) -> None:
    """Write a folder of shards in which something is wrong."""
    shard = root / "a.tar"
    files = numbered(6)
    blocks = (1 + -(-len(files["0000.jpg"]) // 512)) * 512  # of a photo and its header
    match name:
        case "ends early":
            cut(write_tar(shard, files), blocks + 3 * 512)
        case "ends between files":
            cut(write_tar(shard, files), blocks)
        case "damaged":
            write_tar(shard, files)
            content = bytearray(shard.read_bytes())
            content[blocks + 10] ^= 1
            shard.write_bytes(content)
        case "no tar":
            shard.write_bytes(b"text" * 1000)
        case "empty file":
            shard.write_bytes(b"")
        case "empty":
            write_tar(shard, {})
        case "no label":
            write_tar(shard, {key: value for key, value in files.items() if key != "0003.cls"})
        case "no photo":
            write_tar(shard, {key: value for key, value in files.items() if key != "0003.jpg"})
        case "twice":
            write_tar(shard, {**files, "./0003.jpg": b"", "0003.jpg": photo(3)})
        case "two photos":
            write_tar(shard, {**files, "0003.png": photo(3, "PNG")})
        case "unknown label":
            write_tar(shard, {**files, "0003.cls": b"7"})
            (root / "classes.txt").write_text("cat\ndog")
        case "negative label":
            write_tar(shard, {**files, "0003.cls": b"-1"})
            (root / "classes.txt").write_text("cat\ndog")
        case "unknown name":
            write_tar(shard, numbered(6, ("cat", "bird")))
            (root / "classes.txt").write_text("cat\ndog")
        case "numbers and names":
            write_tar(shard, numbered(6, ("cat", 1)))
        case "bad json":
            write_tar(shard, {**files, "0003.json": b"{"})
        case "odd json":
            write_tar(shard, {**files, "0003.json": b'{"label": 0.5}'})
        case "loose photos":
            write_tar(shard, files)
            (root / "cat").mkdir()
            (root / "cat" / "1.jpg").write_bytes(photo(1))
        case "compressed":
            root.joinpath("a.tar.gz").write_bytes(gzip.compress(write_tar(root / "x" / "a.tar", files).read_bytes()))
        case "archives within":
            write_tar(shard, {"1.tar.gz": b"", "1.cls": b"0"})
        case "one class":
            write_tar(shard, numbered(6, (1,)))
        case "one photo":
            write_tar(shard, numbered(6, (0, 1, 1, 1, 1, 1)))
        case "no training":
            write_tar(root / "val-0.tar", files)
        case "some named":
            write_tar(root / "train-0.tar", files)
            write_tar(shard, files)
        case "other classes":
            write_tar(root / "train-0.tar", files)
            write_tar(root / "val-0.tar", numbered(4, (1, 2)))
        case "sparse":
            write_tar(shard, files)
            change_header(shard, 156, b"S")
        case "negative size":
            change_header(write_tar(shard, files), 124, b"-1000\0")
        case "huge folder":
            write_tar(shard, files)
            change_header(shard, 156, b"5")
            change_header(shard, 124, b"\x80" + b"\xff" * 11)


CASES = {
    "ends early": r"a\.tar' ends early, in the middle of '0001\.jpg', after 2 whole files\. Copy or write it again",
    "ends between files": r"a\.tar' ends early, after 1 whole files and without the mark of its end\. Copy",
    "damaged": r"a\.tar' is damaged: there is no header at byte \d,\d+\. Copy or write it again, or remove it\.",
    "no tar": r"a\.tar' is no tar archive\. Copy or write it again, or remove it\.",
    "empty file": r"a\.tar' ends early, after 0 whole files",
    "empty": r"the shard '.*a\.tar' holds no photo\. Write it again, or remove it\.",
    "no label": r"1 of 6 photos in '.*' have no label, as '.*a\.tar/0003\.jpg'\. Expected KEY\.cls, or KEY\.json",
    "no photo": r"a\.tar' has a label for '0003' and no photo\. Add KEY\.jpg",
    "twice": r"a\.tar' holds the photos '0003\.jpg' and '\./0003\.jpg' of one sample\. Give each a sample of its own",
    "two photos": r"a\.tar' holds the photos '0003\.jpg' and '0003\.png' of one sample",
    "unknown label": r"the label 7 of '.*a\.tar/0003\.jpg' is none of the 2 classes \('cat', 'dog'\), which count",
    "negative label": r"the label -1 of '.*a\.tar/0003\.jpg' is none of the 2 classes",
    "unknown name": r"the label 'bird' of '.*a\.tar/0001\.jpg' is none of the 2 classes \('cat', 'dog'\)",
    "numbers and names": r"some labels in '.*' are numbers and some are names \(.*1.*\)\. Use one kind\.",
    "bad json": r"the label '.*a\.tar/0003\.json' cannot be read: Expecting property name .*\. Expected an index",
    "odd json": r"the label in '.*a\.tar/0003\.json' is 0\.5, expected a class: an integer or a name\.",
    "loose photos": r"holds shards \('a\.tar'\) and other photos \(cat/\)\. Keep one kind: move the others out of it\.",
    "compressed": r"holds compressed archives \(a\.tar\.gz\), in which no photo can be reached without unpacking",
    "archives within": r"a\.tar' has a label for '1' and no photo",
    "one class": r"the photos for training in '.*' show one class only \('1'\)\. Classification needs two or more\.",
    "one photo": r"only one photo for '0' in '.*': training and validation need one each",
    "no training": r"has shards for validation, and none for training\. Add train-\*\.tar, or a folder train/\.",
    "some named": r"has shards that are named train \('train-0\.tar'\) and others that are not \('a\.tar'\)\. Put",
    "other classes": r"the classes differ: no photo for training in '.*' shows '2', and some for validation do\.",
    "negative size": r"a\.tar' is no tar archive\. Copy or write it again, or remove it\.",
    "huge folder": r"a\.tar' ends early, after 0 whole files",
    "sparse": r"a\.tar' has a sparse file at byte 512\. Write it again with `tar --format=ustar`\.",
}


@pytest.mark.parametrize("name", CASES)
def test_list_data_refuses_shards_that_are_not_what_they_should_be(name: str, tmp_path: Path) -> None:
    case(name, tmp_path)
    with pytest.raises(DataError, match=CASES[name]):
        list_data(tmp_path)


def test_list_labelled_refuses_labels_that_are_no_classes_of_the_model(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"labels that are not classes of the model: '1'\. The model has '0', 'cat'\."):
        list_labelled(tmp_path, ("0", "cat"))
