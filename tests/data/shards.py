"""Small shards, as the tools that people use write them."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(number: int, kind: str = "JPEG") -> bytes:
    """Draw a photo that is dark for even numbers, and bright for odd ones."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 100, (24, 30, 3)) + 150 * (number % 2)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar archive with Python's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def numbered(count: int, labels: Sequence[Any] = (0, 1), first: int = 0) -> dict[str, bytes]:
    """Return photos with labels in KEY.cls, which alternate."""
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files[f"{number:04}.jpg"] = photo(number)
        files[f"{number:04}.cls"] = str(labels[number % len(labels)]).encode()
    return files


def write_shards(folder: Path, count: int = 10, shards: int = 2, labels: Sequence[Any] = (0, 1)) -> Path:
    """Write shards without a split."""
    for shard in range(shards):
        write_tar(folder / f"{shard:06}.tar", numbered(count, labels, shard * count))
    return folder


def write_table(path: Path, count: int = 12, names: Sequence[str] | None = ("cat", "dog"), rows: int = 5) -> Path:
    """Write a parquet file with the metadata of Hugging Face `datasets`, in row groups of a few rows."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    label: dict[str, Any] = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "string"}
    features = {"image": {"_type": "Image"}, "label": label}
    labels = [number % 2 if names else ("cat", "dog")[number % 2] for number in range(count)]
    photos = [{"bytes": photo(number), "path": f"{number}.jpg"} for number in range(count)]
    table = pa.table({"image": photos, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path
