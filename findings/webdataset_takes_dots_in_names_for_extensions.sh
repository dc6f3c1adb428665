#!/usr/bin/env bash
# webdataset makes one example of all photos whose names agree up to the first dot.
#
# Versions: webdataset 1.0.2, Python 3.11.
# Expected: three photos with their classes (cat.000.jpg and cat.000.cls, and so on) are three examples, as the
#     extension of a file begins at its last dot.
# Seen:
#     cat.000, cat.001, cat.002  1 examples: cat with 000.cls, 000.jpg, 001.cls, 001.jpg, 002.cls, 002.jpg
#     cat_000, cat_001, cat_002  3 examples
# Why it matters: many photo collections number their files so (the best known cats and dogs are cat.0.jpg,
#     dog.0.jpg). Packed as they are, a shard of thousands reads as two examples, and with a handler that skips bad
#     ones as none; the lengths given by with_epoch hide it.
set -euo pipefail
packages="webdataset==1.0.2 numpy==2.4.6"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet $packages
fi
cd "$folder"
"$python" - $packages <<'PYTHON'
import sys
from importlib.metadata import version

pins = dict(pin.split("==") for pin in sys.argv[1:])
assert all(version(name).partition("+")[0] == pin for name, pin in pins.items()), "other versions than those named above"

import io
import tarfile

import webdataset


def read(*stems):
    with tarfile.open("photos.tar", "w") as archive:
        for index, stem in enumerate(stems):
            for extension, content in (("jpg", b"a photo"), ("cls", str(index).encode())):
                entry = tarfile.TarInfo(f"{stem}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return list(webdataset.WebDataset("photos.tar", shardshuffle=False))


dotted, plain = read("cat.000", "cat.001", "cat.002"), read("cat_000", "cat_001", "cat_002")
fields = sorted(key for key in dotted[0] if not key.startswith("__"))
print(f"cat.000, cat.001, cat.002  {len(dotted)} examples: {dotted[0]['__key__']} with {', '.join(fields)}")
print(f"cat_000, cat_001, cat_002  {len(plain)} examples")
assert len(dotted) == 1
assert len(fields) == 6
assert len(plain) == 3
PYTHON
