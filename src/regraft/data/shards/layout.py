"""Which files of a folder are shards, and of which part of the data."""

import re
from pathlib import Path

from regraft.data.samples import TRAIN_NAMES, VALIDATION_NAMES
from regraft.data.system_files import is_ignored
from regraft.errors import DataError

TABLES = (".parquet", ".arrow")
SUFFIXES = (".tar", *TABLES)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LEFT_OVERS = ("cache-", "tmp")  # names of Arrow files that `Dataset.map` leaves beside those of `save_to_disk`
FOLDERS = ("data", *TRAIN_NAMES, *VALIDATION_NAMES, "test")
MAX_SHOWN = 3

# Endings of photos within shards; loose files are told by their content.
# fmt: off
IMAGE_ENDINGS = frozenset((
    "jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "avif",
    "heic", "heif", "img", "image",
))
# fmt: on


def find_shards(root: Path) -> dict[str, list[Path]]:
    """Return the shards in a folder, or the shard that `root` is: those of `train`, `validation`, `test` and ``.

    They may lie in the folder itself and in `data/`, `train/`, `val/` and `test/`. What a shard belongs to is said by a
    word in its name, as in `imagenet-train-000000.tar`, or by its folder.

    Raises:
        DataError: There are shards and loose photos, or archives that are compressed.
    """
    if root.is_file():
        return {"": [root]} if root.suffix.lower() in SUFFIXES else {}
    shards: dict[str, list[Path]] = {}
    others: list[Path] = []
    _look_into(root, "", shards, others)
    compressed = [entry for entry in others if entry.name.lower().endswith(COMPRESSED)]
    if not shards and not compressed:
        return {}
    loose = [entry for entry in others if _holds_photos(entry)]
    if shards and loose:
        example = next(iter(shards.values()))[0]
        raise DataError(
            f"'{root}' holds shards ('{example.relative_to(root)}') and other photos ({_shown(root, loose)}). Keep one "
            "kind: move the others out of it."
        )
    if not shards and not loose:
        raise DataError(
            f"'{root}' holds compressed archives ({_shown(root, compressed)}), in which no photo can be reached "
            "without unpacking all before it. Decompress them into .tar files (gunzip does it for .tar.gz)."
        )
    return shards


def _look_into(folder: Path, part: str, shards: dict[str, list[Path]], others: list[Path]) -> None:
    """Add the shards in a folder, and everything else that is not hidden, in the order of their names."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):  # paths ignore case on Windows
        name = entry.name.lower()
        if is_ignored(name):
            continue
        if name in FOLDERS and entry.is_dir():
            _look_into(entry, part_of(name) or part, shards, others)
        elif name.endswith(SUFFIXES) and entry.is_file():
            if not name.startswith(LEFT_OVERS):
                shards.setdefault(part_of(entry.stem) or part, []).append(entry)
        else:
            others.append(entry)


def part_of(name: str) -> str:
    """Return the part of the data that a file or folder belongs to by its name.

    >>> part_of("imagenet-train-000000"), part_of("validation-00000-of-00002"), part_of("test"), part_of("000000")
    ('train', 'validation', 'test', '')
    """
    words = set(re.findall("[a-z]+", name.lower()))
    parts = {"train": TRAIN_NAMES, "validation": VALIDATION_NAMES, "test": ("test",)}
    return next((part for part, names in parts.items() if words & set(names)), "")


def _holds_photos(entry: Path) -> bool:
    """Return whether an entry of a folder is a photo, or a folder with photos in it, by the endings of names."""
    files = entry.iterdir() if entry.is_dir() else [entry]
    return any(file.suffix.lower().lstrip(".") in IMAGE_ENDINGS for file in files)


def _shown(root: Path, paths: list[Path]) -> str:
    names = [f"{path.relative_to(root)}{'/' if path.is_dir() else ''}" for path in paths[:MAX_SHOWN]]
    return ", ".join(names) + (", …" if len(paths) > MAX_SHOWN else "")
