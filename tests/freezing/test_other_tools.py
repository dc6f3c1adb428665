"""What other tools do with a frozen network: averages, conversions, scripts, compilation."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from freezing.layers_with_state import QUIET, image, tensors
from oracles import identical
from regraft import audit, freeze, unfreeze
from regraft.errors import ModelError
from regraft.freezing.hold import PinState
from regraft.freezing.pins import is_pinned

pytestmark = QUIET


def with_norms() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
    )
    for _ in range(3):
        model(2 * image() + 1)
    freeze(model, "0", "1")
    return model


AVERAGES = {"mean": {}, "mean of buffers": {"use_buffers": True}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=list(AVERAGES))
def test_freeze_keeps_statistics_from_update_bn_which_computes_the_others(options: dict[str, object]) -> None:
    model = with_norms()
    before = tensors(model[:2])
    average = AveragedModel(model, **options)
    for step in range(3):
        train_step(model, step)
        average.update_parameters(model)
    batches = [image() + 5 for _ in range(2)]
    update_bn(batches, average)
    after = tensors(average.module[:2])
    assert [key for key in before if not identical(before[key], after[key])] == []
    features = torch.cat([average.module[:3](batch).detach() for batch in batches])  # the oracle: mean of all pixels
    assert torch.allclose(average.module[3].running_mean, features.mean((0, 2, 3)), atol=1e-5)
    assert (average.module[1].momentum, average.module[3].momentum) == (0.1, 0.1)
    update_bn(batches, model)
    assert [key for key, value in tensors(model[:2]).items() if not identical(before[key], value)] == []


def train_step(model: nn.Module, seed: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(image() + seed).square().mean().backward()
    optimizer.step()


def test_freeze_keeps_what_is_frozen_in_an_average_by_timm() -> None:
    model = with_norms()
    before, average = tensors(model[:2]), ModelEmaV3(model, decay=0.9)
    for step in range(5):
        train_step(model, step)
        average.update(model)
    after = tensors(average.module[:2])
    assert [key for key in before if not identical(before[key], after[key])] == []


def test_unfreeze_lets_reset_running_stats_work_again() -> None:
    model = with_norms()
    before = model[1].running_mean.clone()
    model[1].reset_running_stats()
    assert identical(before, model[1].running_mean)
    unfreeze(model)
    model[1].reset_running_stats()
    assert not model[1].running_mean.any()


def test_audit_finds_norms_that_a_conversion_put_in_and_train_pins_them() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(with_norms())
    assert [(finding.kind, finding.path) for finding in audit(model)] == [("unpinned", "1")]
    model.train()
    assert audit(model) == []
    assert not model[1].training
    assert model[3].training


def test_freeze_leaves_no_pin_in_a_fused_copy() -> None:
    model, inputs = with_norms().eval(), image()
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    assert torch.allclose(fused(inputs), model[:2](inputs), atol=1e-5)
    assert not is_pinned(fused)


SCRIPTED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[], torch.Tensor]]] = {
    "norms": (lambda: with_norms(), ("0", "1"), image),
    "resnet18": (
        lambda: torchvision.models.resnet18(weights=None),
        ("conv1", "bn1", "layer1", "layer2"),
        lambda: torch.randn(1, 3, 64, 64),
    ),
    "mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
        ("features",),
        lambda: torch.randn(1, 3, 64, 64),
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32),
        ("conv_proj", "encoder.layers.encoder_layer_0"),
        lambda: torch.randn(1, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_freeze_then_script_gives_the_same_and_leaves_the_pins(name: str) -> None:
    make, patterns, draw = SCRIPTED[name]
    model, inputs = make().eval(), draw()
    with torch.no_grad():
        expected = model(inputs)
    freeze(model, *patterns)
    before = [(id(layer), PinState.of(layer)) for layer in model.modules()]
    with torch.no_grad():
        assert torch.allclose(torch.jit.script(model)(inputs), expected, atol=1e-5)
        if name != "vit":  # which asks for values of shapes, and cannot be traced in the first place
            assert torch.allclose(torch.jit.trace(model, inputs)(inputs), expected, atol=1e-5)
    assert [(id(layer), PinState.of(layer)) for layer in model.modules()] == before


def test_freeze_stays_pinned_in_a_script_of_a_module_around() -> None:
    around = nn.Sequential(with_norms(), nn.Linear(2, 2)).eval()
    inputs = image()
    expected = around(inputs)
    assert torch.allclose(torch.jit.script(around)(inputs), expected)
    before = around[0][1].running_mean.clone()
    around.train()(inputs)
    assert identical(before, around[0][1].running_mean)


def test_freeze_refuses_torchscript_that_looks_at_its_mode_before_anything_changes() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), part, nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(ModelError, match=r"cannot freeze '1': TorchScript.*Freeze the Python layers before"):
        freeze(model, "0", "1")
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze(model, "0")
    model.train()(image())
    assert part.training


def test_freeze_takes_torchscript_without_a_mode() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2))
    freeze(model, "0", "1")
    before = tensors(model[:2])
    model.train()(image()).sum().backward()
    assert [key for key, value in tensors(model[:2]).items() if not identical(before[key], value)] == []


def test_freeze_lets_compile_take_the_network_whole() -> None:
    model, inputs = with_norms().eval(), image()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)
