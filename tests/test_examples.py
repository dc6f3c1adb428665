"""The same steps in Python and on the command line end with the same network, bit for bit."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_examples_half_new_ends_with_the_same_network_in_both_ways(shared: Path, tmp_path: Path) -> None:
    photos, weights = shared / "data" / "car_vs_bicycle_mini", shared / "weights" / "mobilenetV1X0.25_pretrain.tar"
    bin_first = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "80"}
    for program, script, out in ((sys.executable, "half_new.py", "python"), ("bash", "half_new.sh", "command")):
        command = [program, str(EXAMPLES / script), str(photos), str(weights), str(tmp_path / out)]
        run = subprocess.run(command, env=bin_first, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr
    for name in ("half_new.safetensors", "run/model.safetensors"):
        in_python, on_the_command_line = (load_file(tmp_path / out / name) for out in ("python", "command"))
        assert in_python.keys() == on_the_command_line.keys()
        assert all(torch.equal(tensor, on_the_command_line[key]) for key, tensor in in_python.items())
    started, trained = (
        load_file(tmp_path / "command" / name) for name in ("half_new.safetensors", "run/model.safetensors")
    )
    changed = {key.partition(".")[0] for key in started if not torch.equal(started[key], trained[key])}
    assert changed == {"stage3", "appended_1", "appended_3"}  # the first half is frozen
