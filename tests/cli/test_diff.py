"""`regraft diff`."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

import regraft
import tiny
from regraft.cli.app import app


def test_cli_diff_compares_files_as_a_table_and_as_json(tmp_path: Path) -> None:
    model = tiny.build("plain")
    a = regraft.save(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        model.fc.bias.add_(1)
    torch.save(model.state_dict(), tmp_path / "b.pt")
    run = CliRunner().invoke(app, ["diff", str(a), str(tmp_path / "b.pt"), "--json"])
    result = json.loads(run.stdout)
    assert (run.exit_code, result["identical"], result["counts"]["changed"]) == (0, False, 1)
    table = CliRunner().invoke(app, ["diff", str(a), str(tmp_path / "b.pt")]).stdout
    assert "fc.bias" in table
    assert "1 changed" in table


def test_cli_diff_refuses_a_file_that_is_missing(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["diff", str(tmp_path / "none.pt"), str(tmp_path / "none.pt")])
    assert run.exit_code == 2
    assert "no file" in run.stderr
