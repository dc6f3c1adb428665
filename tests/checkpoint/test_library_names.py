"""What torchvision, timm, transformers and torch rename while they load their own files."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from regraft import create_model, load_weights
from regraft.errors import CheckpointError

State = dict[str, torch.Tensor]


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=4)


def older_vit(state: State) -> State:
    return {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t for name, t in state.items()}


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 8, num_classes=4)


def older_densenet(state: State) -> State:
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))(\d)\.", r"\1.\2.", name): t for name, t in state.items()}


def random_values(model: nn.Module) -> nn.Module:
    """Give every tensor other values than a fresh network has, so that what is not loaded shows."""
    torch.manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model


def assert_loads(state: Any, make: Callable[[], nn.Module], expected: State, folder: Path) -> None:
    torch.save(state, folder / "w.pth")
    model = make()
    report = load_weights(model, folder / "w.pth", strict=True)
    assert {match.confidence for match in report.matches} == {"certain"}
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


WRAPPINGS: dict[str, tuple[str, Callable[[], nn.Module], str]] = {  # prefix in the file, model, prefix in the model
    "plain": ("", vit, ""),
    "wrapped file": ("module.", vit, ""),
    "wrapped model": ("", lambda: nn.DataParallel(vit()), "module."),
    "inside": ("", Inside, "backbone."),
}


@pytest.mark.parametrize("case", WRAPPINGS)
def test_load_weights_reads_older_files_of_torchvisions_vit(case: str, tmp_path: Path) -> None:
    before, make, after = WRAPPINGS[case]
    trained = random_values(vit())
    older = older_vit(trained.state_dict())
    vit().load_state_dict(older)  # which is what torchvision does
    state = {before + name: tensor for name, tensor in older.items()}
    assert_loads(state, make, {after + name: t for name, t in trained.state_dict().items()}, tmp_path)


def test_load_weights_reads_older_files_of_torchvisions_densenet(tmp_path: Path) -> None:
    trained = random_values(densenet())
    assert_loads(older_densenet(trained.state_dict()), densenet, trained.state_dict(), tmp_path)


def test_create_model_reads_older_files_of_torchvisions_vit(tmp_path: Path) -> None:
    trained = torchvision.models.vit_b_16()
    torch.save(older_vit(trained.state_dict()), tmp_path / "vit.pth")
    model = create_model("vit_b_16", weights=tmp_path / "vit.pth")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())


def convnext() -> nn.Module:
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), num_classes=4)


def original_convnext(state: State) -> State:
    rules = (
        (r"^stem\.(\d)", r"downsample_layers.0.\1"),
        (r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2"),
        (r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2"),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.fc", "head"),
        (r"^head\.norm", "norm"),
    )
    return renamed(state, rules)


def swin() -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, depths=(2, 2, 2), num_heads=(2, 4, 8), embed_dim=16, num_classes=4)


def original_swin(state: State) -> State:
    moved = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name): tensor
        for name, tensor in state.items()
    }
    return renamed(moved, ((r"^head\.fc", "head"),))


def deit3() -> nn.Module:
    name = "deit3_small_patch16_224"
    return timm.create_model(name, embed_dim=32, depth=2, num_heads=2, img_size=32, num_classes=4)


def original_deit3(state: State) -> State:
    return renamed(state, ((r"ls(\d)\.gamma", r"gamma_\1"),))


def renamed(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    result = {}
    for before, tensor in state.items():
        name = before
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        result[name] = tensor
    return result


ORIGINALS = {"convnext": (convnext, original_convnext), "swin": (swin, original_swin), "deit3": (deit3, original_deit3)}


@pytest.mark.parametrize("case", ORIGINALS)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "wrapped"])
def test_load_weights_reads_files_of_the_authors_as_timm_does(case: str, prefix: str, tmp_path: Path) -> None:
    make, original = ORIGINALS[case]
    trained = random_values(make())
    state = {prefix + name: tensor for name, tensor in original(trained.state_dict()).items()}
    assert_loads({"model": state}, make, trained.state_dict(), tmp_path)


def test_load_weights_reads_files_from_before_transformers_renamed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    trained = random_values(transformers.ViTForImageClassification(config))
    older = renamed(
        trained.state_dict(),
        (
            (r"^vit\.layers\.", "vit.encoder.layer."),
            (r"attention\.q_proj", "attention.attention.query"),
            (r"attention\.k_proj", "attention.attention.key"),
            (r"attention\.v_proj", "attention.attention.value"),
            (r"attention\.o_proj", "attention.output.dense"),
            (r"mlp\.fc1", "intermediate.dense"),
            (r"mlp\.fc2", "output.dense"),
        ),
    )
    assert_loads(older, lambda: transformers.ViTForImageClassification(config), trained.state_dict(), tmp_path)


def test_load_weights_reads_norms_under_tensorflows_names(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.LayerNorm, self.bn = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)

    trained = random_values(Normed())
    rules = (
        (r"(LayerNorm|bn)\.weight", r"\1.gamma"),
        (r"(LayerNorm|bn)\.bias", r"\1.beta"),
        ("running_mean", "moving_mean"),
        ("running_var", "moving_variance"),
    )
    assert_loads(renamed(trained.state_dict(), rules), Normed, trained.state_dict(), tmp_path)


def network(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 2))


NORMED: dict[str, Callable[[int | None], nn.Module]] = {
    "older": lambda dim: network(nn.utils.weight_norm(nn.Linear(6, 5), dim=dim)),  # pyright: ignore
    "newer": lambda dim: network(parametrizations.weight_norm(nn.Linear(6, 5), dim=dim)),  # pyright: ignore
    "plain": lambda dim: network(nn.Linear(6, 5)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("after", NORMED)
@pytest.mark.parametrize("before", NORMED)
def test_load_weights_computes_what_weight_norm_computes(
    before: str, after: str, dim: int | None, tmp_path: Path
) -> None:
    trained, model = random_values(NORMED[before](dim)), NORMED[after](dim)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = trained(x)
        load_weights(model, tmp_path / "w.pth", strict=True)
        assert torch.allclose(model(x), expected, atol=1e-6)


SPECTRAL = {"older": nn.utils.spectral_norm, "newer": parametrizations.spectral_norm, "plain": lambda layer: layer}


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("after", SPECTRAL)
@pytest.mark.parametrize("before", ["older", "newer"])
def test_load_weights_computes_what_spectral_norm_computes(
    before: str, after: str, kind: type[nn.Module], tmp_path: Path
) -> None:
    def make(name: str) -> nn.Module:
        return nn.Sequential(SPECTRAL[name](kind(4, 4, 3)), nn.Conv2d(4, 2, 1))

    trained, model = make(before), make(after)
    x = torch.randn(2, 4, 8, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about its older function
        trained(x)  # moves the vectors on
        torch.save(trained.eval().state_dict(), tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth", strict=True)
        assert torch.allclose(model.eval()(x), trained(x), atol=1e-6)


def test_load_weights_applies_the_mask_of_pruning(tmp_path: Path) -> None:
    trained, model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    prune.random_unstructured(trained[0], "weight", 0.5)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert torch.equal(model[0].weight, trained[0].weight)
    assert (model[0].weight == 0).sum() == 15


def test_load_weights_never_calls_a_plain_weight_the_same_as_a_normalized_one(tmp_path: Path) -> None:
    plain, model = (
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 2, 1)),
    )
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"nothing for 3 tensors of the model \(0\.weight_orig"):
        load_weights(model, tmp_path / "w.pth")
