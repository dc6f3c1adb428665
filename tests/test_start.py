"""What the start of a process imports, and what a run imports in all: imports take longer than a small training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regraft.data.decoding import native

DEFERRED = """
import gc, importlib.util, sys, types, torch
from regraft import torch_internals
from regraft.torch_internals import defer_compiler
HEAVY = ("torch._dynamo", "torch._inductor")
weight = torch.nn.Parameter(torch.ones(3))
def step(optimizer):
    optimizer.zero_grad()
    (2 * weight).sum().backward()
    optimizer.step()
def unused(name):
    return not hasattr(sys.modules.get(name), "__file__")
with defer_compiler(), defer_compiler():
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    step(optimizer)
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LeakyReLU())
    assert network.to("meta")(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 6, 6)
    assert all(map(sys.modules.get, torch_internals._COMPILER_READERS))
    assert all(map(importlib.util.find_spec, HEAVY))
    assert all(map(unused, HEAVY))
    print("deferred")
functions = [value for value in gc.get_objects() if isinstance(value, types.FunctionType)]
assert not any("__dynamo_disable" in vars(function) for function in functions)
assert not any(name in sys.modules for name in HEAVY)
assert "_dynamo" not in vars(torch)
print("restored")
with defer_compiler():
    step(optimizer)
    assert torch.compiler.disable(len, reason="it is short")([1]) == 1
    from torch._dynamo import config
    assert torch._dynamo.config is config and not unused("torch._dynamo")
    print("imported")
compiled = torch.compile(step, backend="eager")
compiled(optimizer)
assert optimizer.zero_grad.__wrapped__.__dynamo_disable is not torch.optim.Optimizer.zero_grad.__wrapped__
print("compiled")
"""
NETWORK = """
from torch import nn
class Small(nn.Sequential):
    def __init__(self):
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(), *pool, nn.Linear(4, 2))
"""
HEAD_ALONE = """
import sys
from regraft import fit
result = fit("py:small.py:Small", "photos", freeze=["0", "1"], augment="none", epochs=3, trust_code=True, progress=True)
assert result.computed_once is not None
print(*sys.modules)
"""
UNUSED = (
    *("IPython", "jinja2", "matplotlib", "pandas", "scipy", "sklearn", "timm", "torchvision", "transformers"),
    *("sympy", "torch._dynamo", "torch._inductor"),
)


def output(code: str, folder: Path | None = None) -> list[str]:
    """Run Python code in a process of its own, and return the words that it prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_start_defers_the_compiler_and_leaves_torch_as_it_was() -> None:
    assert output(DEFERRED) == ["deferred", "restored", "imported", "compiled"]


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        ("import regraft, regraft.errors", ("torch", "numpy", "pydantic", "rich", "typer", *UNUSED)),
        ("import regraft.cli.app", ("torch", "numpy", "pydantic", "rich", *UNUSED)),
        ("import regraft; regraft.fit", ("rich", "torch.utils.flop_counter", *UNUSED)),
    ],
)
def test_start_imports_only_what_is_used(code: str, unused: tuple[str, ...]) -> None:
    assert set(output(f"{code}\nimport sys\nprint(*sys.modules)")) & set(unused) == set()


@pytest.mark.skipif(
    "torchcodec" not in getattr(native.library(), "name", ""), reason="decoding is torchvision's, which imports much"
)
def test_fit_of_a_head_imports_only_what_is_used(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(NETWORK)
    noise = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(8):
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.jpg")
    assert set(output(HEAD_ALONE, tmp_path)) & set(UNUSED) == set()
