"""A minute of coverage-guided fuzzing, where atheris is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from originals import write_all

SCRIPT = Path(__file__).parent / "guided.py"


@pytest.mark.fuzz
def test_guided_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    (tmp_path / "fuzz-failures").mkdir()
    folder = tmp_path / "originals"
    folder.mkdir()
    for path in write_all(folder).values():
        if path.stat().st_size > 20_000:
            path.rename(tmp_path / path.name)
    # The largest file is no corpus, but still an original.
    (tmp_path / "edited.safetensors").rename(folder / "edited.safetensors")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "60"], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-3000:]
