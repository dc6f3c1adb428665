"""`evaluate` on the photos that a network was trained on measures those that were held out."""

from pathlib import Path
from typing import Any

import pytest

import regraft
from scene import write_folder


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_evaluate_leaves_out_what_was_trained_on(share: float, fit: Any, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "some")
    result = fit(photos, validation_share=share, seed=3, out=str(tmp_path / "run"))
    model = regraft.load(tmp_path / "run" / "model.safetensors", trust_code=True)
    moved = photos.rename(tmp_path / "elsewhere")
    metrics = regraft.evaluate(model, moved, progress=False)
    assert (metrics.count, metrics.accuracy) == (result.validation.count, result.validation.accuracy)
    assert metrics.scores is not None
    assert [path.name for path in metrics.scores.paths] == [path.name for path in result.paths]
    (moved / "cats" / "new.png").write_bytes(next((moved / "cats").iterdir()).read_bytes())
    everything = len([path for path in moved.rglob("*.*") if path.is_file()])
    assert regraft.evaluate(model, moved, progress=False).count == everything  # another set of photos
