"""A small member of every family: create, change the head, freeze half, train, save, and load in another process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from families import IS_COMPLETE
from oracles import identical
from regraft import create_model, freeze, replace_head, save
from regraft.training.loop import main_output
from regraft.zoo import preprocessing_of

pytestmark = pytest.mark.slow

TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2
"""
TIMM = """
    convnext_atto convnextv2_atto levit_128s deit_tiny_distilled_patch16_224 vit_tiny_patch16_224
    eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224 pit_ti_224 tiny_vit_5m_224 coat_lite_tiny
    crossvit_9_240 pvt_v2_b0 mobilevit_xxs mobilevitv2_050 edgenext_xx_small efficientformer_l1 fastvit_t8
    poolformer_s12 resmlp_12_224 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv4_conv_small_035 ghostnet_050
    lcnet_035 tinynet_e semnasnet_050 repvgg_a0 regnetx_002 resnet10t skresnet18 dla46_c hrnet_w18_small
    ese_vovnet19b_slim_dw test_nfnet test_mambaout test_byobnet starnet_s1
"""
NAMES = [*TORCHVISION.split(), *(f"timm/{name}" for name in TIMM.split())]
CLASSES, SMALL_SIDE = 7, 64

WORKER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from regraft import load
for line in sys.stdin:
    job = json.loads(line)
    model = load(job["model"])
    with torch.inference_mode():
        save_file({"outputs": model(load_file(job["inputs"])["inputs"].clone())}, job["outputs"])
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def other_process() -> Iterator[subprocess.Popen[str]]:
    """Start a process that knows of a model only what its file says."""
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.mark.parametrize("name", NAMES if IS_COMPLETE else NAMES[::2])
def test_architectures_go_the_whole_way(name: str, tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    from safetensors.torch import load_file, save_file

    original = create_model(name, weights="none").eval()
    model = replace_head(original, CLASSES)
    inputs, executed = run_once(original)
    middle = executed[(len(executed) - 1) // 2]
    freeze(model, until=middle)
    front = tuple(f"{child}." for child in executed[: executed.index(middle) + 1])
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    train(model, inputs)

    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    after = model.state_dict()
    assert frozen
    assert [key for key in after if key.startswith(front) and not identical(before[key], after[key])] == []
    assert [key for key in frozen if not identical(before[key], after[key])] == []
    moved = [
        key for key, p in model.named_parameters() if p.grad is not None and not identical(before[key], after[key])
    ]
    assert moved
    assert main_output(model.eval()(inputs)).shape == (2, CLASSES)

    job = {"model": save(model, tmp_path / "model.safetensors")}
    job |= {"inputs": tmp_path / "inputs.safetensors", "outputs": tmp_path / "outputs.safetensors"}
    save_file({"inputs": inputs}, job["inputs"])
    assert other_process.stdin is not None
    assert other_process.stdout is not None
    other_process.stdin.write(json.dumps({key: str(path) for key, path in job.items()}) + "\n")
    other_process.stdin.flush()
    assert other_process.stdout.readline() == "done\n"
    with torch.inference_mode():
        assert identical(load_file(job["outputs"])["outputs"], model(inputs))
    job["model"].unlink()


def run_once(model: nn.Module) -> tuple[torch.Tensor, list[str]]:
    """Run on the smallest images that fit; return them and the top-level layers with parameters as executed."""
    executed: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: executed.append(path.partition(".")[0]))
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None and path
    ]
    for side in (SMALL_SIDE, preprocessing_of(model).size):
        inputs, problem = torch.randn(2, 3, side, side), None
        executed.clear()
        try:
            with torch.no_grad():
                model(inputs)
            break
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = error
    assert problem is None, problem
    for hook in hooks:
        hook.remove()
    return inputs, list(dict.fromkeys(executed))


def train(model: nn.Module, inputs: torch.Tensor) -> None:
    """Take two steps with an optimizer that would move whatever it may."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    for step in range(2):
        model.train()
        loss = F.cross_entropy(main_output(model(inputs + step)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
