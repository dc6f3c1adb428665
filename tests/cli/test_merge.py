"""Commands that take a delta are told where its base is."""

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner

from checkpoint.altered import assert_equal, chain
from regraft import load
from regraft.checkpoint import read_header
from regraft.cli.app import app


def test_cli_merge_writes_one_full_file(tmp_path: Path) -> None:
    path, model = chain(tmp_path, 2)
    out = tmp_path / "full.safetensors"
    ran = CliRunner().invoke(app, ["merge", str(path), "--out", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output) == {"checkpoint": str(out), "tensors": 10, "digest": read_header(path).digest()}
    assert_equal(load(out), model)
    assert CliRunner().invoke(app, ["merge", str(path), "--out", str(out)]).exit_code == 2
    moved = Path(shutil.move(path, tmp_path / "moved.safetensors"))
    (tmp_path / "bases").mkdir()
    for name in ("0.safetensors", "1.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "bases")
    refused = CliRunner().invoke(app, ["merge", str(moved), "--out", str(out), "--overwrite"])
    assert refused.exit_code == 2
    assert "--base FILE" in refused.output
    ran = CliRunner().invoke(
        app, ["merge", str(moved), "--out", str(out), "--overwrite", "--base", str(tmp_path / "bases")]
    )
    assert ran.exit_code == 0, ran.output
    assert f"{out}: 10 tensors, digest" in ran.output
