"""Files that hold no weights, or those of another framework, are named as what they are."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from oracles import same, snapshot
from regraft import load, load_weights
from regraft.errors import CheckpointError


def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2).state_dict(), buffer)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("m.pth")
        info.size = len(weights())
        archive.addfile(info, io.BytesIO(weights()))
    return buffer.getvalue()


def repository() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("repo/README.md", "read me")
        archive.writestr("repo/model.pth", weights())
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
KINDS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "pointer": ("w.pth", lambda: LFS, r"a Git LFS pointer to 46,830,571 bytes.* Run `git lfs pull`"),
    "pointer, safetensors": ("w.safetensors", lambda: LFS, "a Git LFS pointer to 46,830,571 bytes"),
    "page": ("w.pth", lambda: PAGE, r"a web page \(Sign in\)\. Download the file itself"),
    "page, capitals": ("w.bin", lambda: b"<HTML lang=en><TITLE>x</TITLE>", "a web page"),
    "denied": ("w.pth", lambda: DENIED, "XML with the answer of a server, AccessDenied"),
    "not found": ("w.pth", lambda: b"404: Not Found", "the answer of a server, '404: Not Found'"),
    "entry not found": ("w.bin", lambda: b"Entry not found", "the answer of a server, 'Entry not found'"),
    "error in JSON": ("w.pth", lambda: b'{"error": "No such file"}', "the answer of a server, 'No such file'"),
    "configuration": ("config.json", lambda: b'{"hidden_size": 3}', "JSON with 'hidden_size', as a configuration"),
    "index": ("w.json", lambda: json.dumps({"weight_map": {}}).encode(), r"Call it 'w\.index\.json'"),
    "empty": ("w.pth", lambda: b"", r"empty \(0 bytes\)"),
    "text": ("w.pth", lambda: "Grüße".encode(), "text, which begins 'Grüße'"),
    "gzip": ("w.pth.gz", lambda: gzip.compress(weights()), "a gzip archive. Unpack it"),
    "tar": ("w.tar", tar, "a tar archive. Unpack it"),
    "repository": ("repo.zip", repository, r"a zip archive of 2 files .*'repo/model\.pth'.* Unpack it"),
    "7-Zip": ("w.7z", lambda: b"7z\xbc\xaf\x27\x1c\0\0", "a 7-Zip archive"),
    "RAR": ("w.rar", lambda: b"Rar!\x1a\x07\x01\0", "a RAR archive"),
    "HDF5": ("w.h5", lambda: b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file, as Keras"),
    "TensorFlow Lite": ("w.tflite", lambda: b"\x1c\0\0\0TFL3\0\0\0\0", "a TensorFlow Lite model"),
    "TensorFlow": ("model.ckpt.data-00000-of-00001", lambda: bytes(range(256)), "a part of a TensorFlow checkpoint"),
    "frozen graph": ("frozen.pb", lambda: b"\x0a\xff\x12\xfe\0", "a TensorFlow graph"),
    "ONNX": ("w.onnx", lambda: b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0\x01:", "an ONNX model"),
    "ONNX by another name": ("w.bin", lambda: b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0\x01:", "an ONNX model"),
    "Flax": ("w.msgpack", lambda: b"\x81\xa6params\x81\xa1w\xc7\x10\x01", "a Flax checkpoint"),
    "GGUF": ("w.gguf", lambda: b"GGUF\3\0\0\0", "a GGUF file"),
    "Core ML": ("w.mlmodel", lambda: b"\x08\x04\x12\xff\x01ab", "a Core ML model"),
    "array": ("w.npy", array, r"one NumPy array without a name .* numpy\.savez"),
    "cut off": ("w.safetensors", lambda: save({"weight": torch.ones(2)})[:50], "cut off in its header"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_load_weights_names_what_is_no_file_of_weights(case: str, tmp_path: Path) -> None:
    name, content, message = KINDS[case]
    (tmp_path / name).write_bytes(content())
    model = nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / name)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("content", [LFS, PAGE, b""], ids=["pointer", "page", "empty"])
def test_load_names_what_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights: it is (a Git LFS pointer|a web page|empty)"):
        load(tmp_path / "w.safetensors")


FOLDERS = {
    "saved_model.pb": "a TensorFlow SavedModel",
    ".metadata": "a checkpoint of torch.distributed",
    "adapter_config.json": "an adapter of peft. Merge it",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed",
    "model.pth": "it holds 'model.pth'. Give the path of one of them",
    "notes.txt": "it holds no file of weights",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_load_weights_names_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Linear(2, 2), tmp_path)
    assert FOLDERS[name] in str(caught.value)
