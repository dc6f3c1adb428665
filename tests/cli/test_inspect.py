"""`regraft inspect`."""

import json
import os
import re
import struct
from pathlib import Path

from typer.testing import CliRunner

import regraft
import tiny
from checkpoint.altered import chain, shake
from checkpoint.planned import write_plan
from regraft import create_model, freeze, save, to_source, truncate
from regraft.checkpoint import read_header
from regraft.cli.app import app
from scene import Cli, only_json


def test_cli_inspect_shows_all_but_the_layers_without_leave(saved: Path, cli: Cli) -> None:
    shown = only_json(cli("inspect", saved, "--json").stdout)
    assert shown["layers"] == []
    assert "--trust-code" in shown["problem"]
    assert shown["checkpoint"]["card"]["classes"] == ["cats", "dogs"]
    assert "layers     not shown: " in cli("inspect", saved).stdout


def test_cli_inspect_reads_the_header_alone_of_a_delta(tmp_path: Path) -> None:
    path, _ = chain(tmp_path, 1)
    (tmp_path / "0.safetensors").unlink()
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "base       file 0.safetensors (digest " in shown.output
    assert "; 1 tensors differ" in shown.output
    refused = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert refused.exit_code == 2


def test_cli_inspect_reads_a_header_alone_where_nothing_else_is_asked(tmp_path: Path) -> None:
    model = create_model("resnet18", weights="none", num_classes=3)
    freeze(model, until="layer2")
    path = save(model.half(), tmp_path / "model.safetensors")
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    os.truncate(path, 8 + length)
    os.truncate(path, size)  # all tensors are a hole in the file
    before = bytes_read()
    header = read_header(path)
    assert header is not None
    assert len(header.digests) == 122
    if before is not None:
        assert bytes_read() - before < 2 * length + 10_000 < size / 100
    shown = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.output)
    assert next(layer for layer in found["layers"] if layer["path"] == "layer1")["state"] == "frozen"
    assert found["checkpoint"]["digests"] == header.digests
    refused = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert refused.exit_code == 2
    assert "is not what was saved" in refused.output


def bytes_read() -> int | None:
    """Return how many bytes this process has asked files for; None where the system does not say."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    text = counters.read_text()
    return int(re.search(r"rchar: (\d+)", text)[1]) - len(text)


def test_cli_inspect_with_verify_says_so(tmp_path: Path) -> None:
    path = save(shake(tiny.build("sequential")), tmp_path / "model.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert shown.exit_code == 0, shown.output
    assert "verified   every tensor is what was saved" in shown.output
    nothing = CliRunner().invoke(app, ["inspect", "resnet18", "--verify"])
    assert nothing.exit_code == 2
    assert "'resnet18' is no checkpoint, so there is nothing to verify" in nothing.output


def test_cli_inspect_reads_no_tensor_of_an_index(tmp_path: Path) -> None:
    index = save(shake(tiny.build("sequential")), tmp_path / "model.safetensors", shard_bytes=400)
    shown = CliRunner().invoke(app, ["inspect", str(index), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["checkpoint"]["digests"] == read_header(index).digests
    assert CliRunner().invoke(app, ["inspect", str(tmp_path), "--depth", "1"]).exit_code == 0


def test_cli_inspect_prints_the_source(tmp_path: Path) -> None:
    model = truncate(create_model("squeezenet1_1", weights="none"), after="features.7")
    path = save(model, tmp_path / "small.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(path), "--source"])
    assert shown.exit_code == 0
    assert shown.stdout == to_source(model)


def test_cli_inspect_prints_a_plan_that_builds_the_same(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    model = regraft.build_plan(regraft.read_plan(plan))
    saved = regraft.save(model, tmp_path / "edited.safetensors")
    printed = CliRunner().invoke(app, ["inspect", str(saved), "--plan"])
    assert printed.exit_code == 0
    again = tmp_path / "again.toml"
    again.write_text(printed.stdout)
    found = regraft.read_plan(again)
    assert found.edits == regraft.read_plan(plan).edits
    rebuilt = regraft.build_plan(found)
    flags = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in rebuilt.named_parameters() if not parameter.requires_grad} == flags
