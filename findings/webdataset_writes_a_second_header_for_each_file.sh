#!/usr/bin/env bash
# webdataset's TarWriter puts an extended header before every file, so that labels take twice the room.
#
# Versions: webdataset 1.0.2, Python 3.11.
# Expected: a file of one byte, such as a label (`.cls`), takes two blocks of 512 bytes in a shard: a header and a block.
# Seen:
#     1,000 photos of 300 bytes with a label: 3.92 MiB by TarWriter, 1.96 MiB by tarfile with whole seconds
#     The time of writing is given as a float, and the fraction of a second needs an extended (pax) header of two blocks,
#     before each photo and each label.
# Why it matters: shards hold millions of small files. Ten million photos with labels get 19 GiB of fractions of seconds,
#     and whoever lists a shard reads two headers for each file: tarfile took 1.3 s instead of 0.5 s for 10,000 photos.
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
assert all(version(name) == pin for name, pin in pins.items()), "other versions than those named above"

import io
import tarfile
import time
from pathlib import Path

import webdataset

COUNT = 1_000
with webdataset.TarWriter("theirs.tar") as writer:
    for number in range(COUNT):
        writer.write({"__key__": f"{number:06}", "jpg": bytes(300), "cls": "1"})
with tarfile.open("plain.tar", "w") as plain:
    for number in range(COUNT):
        for name, content in ((f"{number:06}.jpg", bytes(300)), (f"{number:06}.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), int(time.time())
            plain.addfile(member, io.BytesIO(content))
sizes = [Path(name).stat().st_size for name in ("theirs.tar", "plain.tar")]
print(f"{COUNT:,} photos of 300 bytes with a label: {sizes[0] / 2**20:.2f} MiB by TarWriter, "
      f"{sizes[1] / 2**20:.2f} MiB by tarfile with whole seconds")
with tarfile.open("theirs.tar") as theirs:
    members = theirs.getmembers()
assert len(members) == 2 * COUNT
assert all("." in member.pax_headers["mtime"] for member in members)
assert sizes[0] > 1.9 * sizes[1]
PYTHON
