"""One hostile file after the other: what is drawn from a random generator decides all of it.

The long run counts seeds up; the short one lets hypothesis choose them.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from hostile_pickles import hostile_pickle
from originals import OWN
from recipes import hostile_recipe

INTERESTING = (0, 1, 2, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
EDGE_BYTES = 600  # at either end of a file, where its headers are
DEEP = (50, 120, 1000, 1100)  # Python parses no JSON that is deeper than some 1,000
UNPACKED_BYTES = 193 * 2**20  # just more than may be claimed beyond the size of a file

Files = Mapping[str, bytes]


def mutated(random: Random, files: Files) -> tuple[str, str, bytes]:
    """Return a hostile file: what was done, the name of the original, and its bytes."""
    kind = random.choices(list(_KINDS), weights=[weight for weight, _ in _KINDS.values()])[0]
    return _KINDS[kind][1](random, files)


def _bytes(random: Random, files: Files) -> tuple[str, str, bytes]:
    name = random.choice(sorted(files))
    raw = bytearray(files[name])
    done = []
    for _ in range(random.choice([1, 1, 2, 5])):
        change = random.choice(list(_CHANGES))
        _CHANGES[change](random, raw, files)
        done.append(change)
    return " + ".join(done), name, bytes(raw)


def _place(random: Random, raw: bytearray) -> int:
    size = max(len(raw), 1)
    near = random.randrange(min(size, EDGE_BYTES))
    return random.choice([near, size - 1 - near, random.randrange(size)])


def _truncate(random: Random, raw: bytearray, files: Files) -> None:
    del raw[_place(random, raw) :]


def _flip(random: Random, raw: bytearray, files: Files) -> None:
    if raw:
        raw[_place(random, raw)] ^= 1 << random.randrange(8)


def _overwrite(random: Random, raw: bytearray, files: Files) -> None:
    place, width = _place(random, raw), random.choice("BHIQ")
    value = random.choice(INTERESTING) % 256 ** struct.calcsize(width)
    raw[place : place + struct.calcsize(width)] = struct.pack(f"<{width}", value)


def _insert(random: Random, raw: bytearray, files: Files) -> None:
    place = _place(random, raw)
    raw[place:place] = random.choice([b"\0", b"{", b"[" * 60, b'"', b"\xff" * 9, b"cmarker\ncall\n", b"9" * 40])


def _remove(random: Random, raw: bytearray, files: Files) -> None:
    place = _place(random, raw)
    del raw[place : place + random.choice([1, 8, 100])]


def _repeat(random: Random, raw: bytearray, files: Files) -> None:
    place = _place(random, raw)
    raw[place:place] = raw[place : place + random.choice([1, 8, 100])] * random.choice([1, 2, 50])


def _splice(random: Random, raw: bytearray, files: Files) -> None:
    other = files[random.choice(sorted(files))]
    raw[_place(random, raw) :] = other[random.randrange(len(other)) :]


def _digit(random: Random, raw: bytearray, files: Files) -> None:
    digits = [place for place, sign in enumerate(raw[:3000]) if 48 <= sign < 58]
    if digits:
        raw[random.choice(digits)] = 48 + random.randrange(10)


_CHANGES: dict[str, Callable[[Random, bytearray, Files], None]] = {
    "truncated": _truncate,
    "bit flipped": _flip,
    "number overwritten": _overwrite,
    "inserted": _insert,
    "removed": _remove,
    "repeated": _repeat,
    "spliced": _splice,
    "digit changed": _digit,
}


def _split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _joined(header: dict[str, Any] | bytes, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def odd(random: Random) -> Any:
    """Return a JSON value that no field expects."""
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    values = [
        None,
        True,
        -1,
        0,
        1.5,
        2**31,
        2**63,
        10**30,
        "",
        "x",
        "../x",
        "\ud800",
        [],
        {},
        [[]],
        [2**62, 2**62],
        float("nan"),
    ]
    values += ["1" * 3000, {"a": {"b": []}}, deep, ["F32"], float("inf"), "re:.*", "py:marker:Thing", "/outside"]
    return random.choice(values)


def _layout(random: Random, files: Files) -> tuple[str, str, bytes]:
    """Describe the tensors of a safetensors file wrongly."""
    name = random.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    header, body = _split(files[name])
    tensors = [key for key in header if key != "__metadata__"]
    key = random.choice(tensors)
    entry, other = header[key], header[random.choice(tensors)]
    length = None
    change = random.choice(
        ["length", "offsets", "overlap", "shape", "dtype", "field", "name", "twice", "deep", "many", "metadata"]
    )
    if change == "length":
        length = random.choice([*INTERESTING, len(body)])
    elif change == "offsets":
        entry["data_offsets"] = random.choice(
            [odd(random), [odd(random), odd(random)], [0, 2**62], entry["data_offsets"][::-1]]
        )
    elif change == "overlap":
        entry["data_offsets"] = other["data_offsets"]
        entry["shape"] = random.choice([entry["shape"], other["shape"]])
    elif change == "shape":
        shapes = [
            odd(random),
            [*entry["shape"], 1],
            [-1],
            [0, 2**62, 2**62],
            [2**40],
            [1] * 65,
            [True],
            entry["shape"][::-1],
        ]
        entry["shape"] = random.choice(shapes)
    elif change == "dtype":
        entry["dtype"] = random.choice(
            ["F64", "F16", "I64", "I32", "BOOL", "F4", "C64", "F8_E8M0", "U64", "f32", "", odd(random)]
        )
    elif change == "field":
        header[key] = random.choice([odd(random), {**entry, "x": 1}, {"dtype": "F32"}])
    elif change == "name":
        header[random.choice(["", "../x", "\ud800", "a" * 1001, "training", "0.weight.x"])] = header.pop(key)
    elif change == "metadata":
        header["__metadata__"] = odd(random)
    text = json.dumps(header)
    if change == "twice":
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(random.choice([entry, other]))}}}"
    elif change == "deep":
        sign = random.choice(["[]", "{}"])
        depth = random.choice(DEEP)
        text = text[:-1] + ', "x": ' + ('{"a":' if sign == "{}" else "[") * depth + "1" + sign[1] * depth + "}"
    elif change == "many":
        text = text[:-1] + ', "x": [' + random.choice(["[],", "{},", "1,"]) * random.choice([10, 1_000_001]) + "1]}"
    return f"layout: {change}", name, _joined(text.encode("utf-8", "surrogatepass"), body, length)


def _document(random: Random, files: Files) -> tuple[str, str, bytes]:
    """Change what regraft's own part of a header says."""
    name = random.choice(OWN)
    header, body = _split(files[name])
    document = json.loads(header["__metadata__"]["regraft"])
    change = random.choice(
        ["any field", "any field", "digests", "shared", "frozen", "deep", "recipe", "recipe", "cast", "unknown"]
    )
    if change == "any field":
        for _ in range(random.choice([1, 1, 3])):
            holder, key = random.choice(list(_fields(document)))
            if random.random() < 0.2:
                del holder[key]
                break
            holder[key] = odd(random)
    elif change == "digests":
        key = random.choice(list(document["digests"]))
        document["digests"] = random.choice(
            [
                {},
                {**document["digests"], key: "0" * 64},
                {**document["digests"], "x": "y"},
                {key: document["digests"][key]},
            ]
        )
        body = bytearray(body)
        body[random.randrange(len(body))] ^= 1
    elif change == "shared":
        names = [*document["digests"], "x", "", "../x", "0.training"]
        document["shared"] = {random.choice(names): random.choice(names) for _ in range(random.randint(1, 4))}
    elif change == "frozen":
        document["frozen"] = random.sample([*document["digests"], "x"], random.randint(0, 3))
    elif change == "recipe":
        document["card"]["recipe"] = hostile_recipe(random, document["card"]["recipe"])
    elif change == "cast":
        return _cast(random, name, header, document, body)
    elif change == "unknown":
        document["trust_code"] = document["card"]["trust_code"] = True
        document["card"]["recipe"]["trust_code"] = True
    text = json.dumps(document)
    if change == "deep":
        depth = random.choice(DEEP)
        text = text[:-1] + f', "metadata": {{"x": {"[" * depth}{"]" * depth}}}}}'
    header["__metadata__"]["regraft"] = text
    return f"document: {change}", name, _joined(header, bytes(body))


def _cast(
    random: Random, name: str, header: dict[str, Any], document: dict[str, Any], body: bytes
) -> tuple[str, str, bytes]:
    """Give a tensor another dtype of the same width, with the digest that belongs to it."""
    import hashlib

    pairs = {"F32": ("I32", "torch.int32"), "I64": ("F64", "torch.float64")}
    key = random.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    entry["dtype"], written = pairs[entry["dtype"]]
    begin, end = entry["data_offsets"]
    document["digests"][key] = hashlib.sha256(
        f"{written}{tuple(entry['shape'])}".encode() + body[begin:end]
    ).hexdigest()
    header["__metadata__"]["regraft"] = json.dumps(document)
    return "document: cast", name, _joined(header, body)


def _fields(value: Any) -> list[tuple[Any, Any]]:
    """List the places in a JSON value, as what holds them and their key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_fields(value[key]))]


def _archive(random: Random, files: Files) -> tuple[str, str, bytes]:
    """Write a zip file that lies: names that lead out, sizes, entries twice."""
    name = random.choice(["zip.pt", "w.ckpt", "arrays.npz", "packed.npz", "script.pt"])
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    change = random.choice(["claim", "names", "twice", "sizes", "overlap", "deflated", "many", "array", "record"])
    buffer, packing = io.BytesIO(), zipfile.ZIP_STORED
    place = random.randrange(len(entries))
    key, content = entries[place]
    if change == "claim":
        packing = zipfile.ZIP_DEFLATED
        entries[place] = (key, bytes(1000))
    elif change == "names":
        entries[place] = (random.choice(["../x", "/x", "a\\x", "x:/x", "~/x", "", "x/../y"]), content)
    elif change == "deflated":
        packing = zipfile.ZIP_DEFLATED
    elif change == "many":
        entries += [(f"x/{number}", b"") for number in range(random.choice([100, 3000]))]
    elif change == "array":
        shape = random.choice(["(5,)", "(-1,)", "(2, 3", "call()", "(4,)" + " " * 99])
        kind = random.choice(["<f4", "|O", "<U9", "|V99", "x"])
        head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        entries = [entry for entry in entries if entry[0] != "0.bias.npy"]
        entries.append(("0.bias.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(16)))
    elif change == "record":
        entries[place] = (key, content[: random.randrange(len(content) + 1)])
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for key, content in entries:
            archive.writestr(zipfile.ZipInfo(key), content, packing)
        if change == "twice":
            archive.fp.write(b"")  # the same entry under two names of the list
            archive.filelist.append(archive.filelist[place])
        if change == "overlap":
            largest = max(archive.filelist, key=lambda entry: entry.file_size)
            for number in range(random.choice([1, 3])):
                copy = zipfile.ZipInfo(f"archive/data/x{number}")
                copy.header_offset, copy.file_size, copy.compress_size = (
                    largest.header_offset,
                    largest.file_size,
                    largest.file_size,
                )
                copy.CRC = largest.CRC
                archive.filelist.append(copy)
        if change == "claim":
            archive.filelist[place].file_size = random.choice([UNPACKED_BYTES, UNPACKED_BYTES // 50])
        if change == "sizes":
            entry = archive.filelist[place]
            entry.file_size = random.choice([UNPACKED_BYTES, 0, entry.file_size + 1])
            entry.compress_size = random.choice([entry.file_size, entry.compress_size])
        archive._didModify = True
    return f"archive: {change}", name, buffer.getvalue()


def _pickle(random: Random, files: Files) -> tuple[str, str, bytes]:
    kind, raw = hostile_pickle(random)
    return f"pickle: {kind}", "zip.pt", raw


_KINDS: dict[str, tuple[int, Callable[[Random, Files], tuple[str, str, bytes]]]] = {
    "bytes": (40, _bytes),
    "layout": (18, _layout),
    "document": (14, _document),
    "archive": (10, _archive),
    "pickle": (18, _pickle),
}


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the originals."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
