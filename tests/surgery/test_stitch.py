"""Two networks in one: the front's own activation, through the adapter, into the back's own rest."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import regraft
import tiny
from oracles import identical, same, snapshot
from regraft.errors import EditError, SelectionError
from regraft.surgery.adapters import adapter_for
from regraft.surgery.tail import tail


def activation(model: nn.Module, path: str, inputs: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[-1]


BACKS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "plain": (lambda: tiny.build("plain"), "bn1", (2, 3, 8, 8)),
    "resnet18": (models.resnet18, "layer2", (2, 3, 64, 64)),
    "densenet121": (models.densenet121, "features.denseblock2", (2, 3, 64, 64)),
    "vit": (lambda: models.VisionTransformer(32, 16, 3, 2, 24, 48), "encoder.layers.encoder_layer_0", (2, 3, 32, 32)),
    "swin_t": (models.swin_t, "features.3", (2, 3, 64, 64)),
    "inception_v3": (lambda: models.inception_v3(init_weights=False), "Mixed_5d", (2, 3, 96, 96)),
}


@pytest.mark.parametrize("name", BACKS)
def test_tail_goes_on_as_the_rest_of_the_network_did(name: str) -> None:
    make, path, shape = BACKS[name]
    model, inputs = make().eval(), torch.randn(shape)
    before = snapshot(model)
    rest = tail(model, path)
    with torch.no_grad():
        assert identical(rest(activation(model, path, inputs)), model(inputs))
    assert same(before, snapshot(model))
    assert set(rest.state_dict()) < set(model.state_dict())


def test_stitch_is_front_adapter_and_back() -> None:
    front, back = models.resnet18().eval(), models.mobilenet_v3_small().eval()
    stitched = regraft.stitch(front, back, cut=("layer2", "features.8"))
    inputs = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = tail(back, "features.8")(stitched.adapter(activation(front, "layer2", inputs)))
        assert identical(stitched(inputs), expected)
    assert stitched.front.conv1.weight is front.conv1.weight
    stitched(inputs).sum().backward()
    assert front.conv1.weight.grad is not None
    assert back.classifier[3].weight.grad is not None
    assert front.fc.weight.grad is None


SHAPES = [
    ((1, 8, 14, 14), (1, 16, 7, 7)),
    ((1, 8, 7, 7), (1, 16, 14, 14)),
    ((1, 8, 7, 7), (1, 8, 7, 7)),
    ((1, 8, 14, 14), (1, 50, 24)),
    ((1, 8, 14, 14), (1, 49, 24)),
    ((1, 50, 24), (1, 16, 14, 14)),
    ((1, 49, 24), (1, 49, 12)),
    ((1, 8, 7, 7), (1, 12)),
    ((1, 50, 24), (1, 12)),
    ((1, 12), (1, 5)),
    ((1, 12), (1, 4, 3, 3)),
]


@pytest.mark.parametrize(("given", "wanted"), SHAPES)
@pytest.mark.parametrize("is_fitted", [False, True])
def test_adapter_for_leads_from_one_shape_to_the_other(
    given: tuple[int, ...], wanted: tuple[int, ...], is_fitted: bool
) -> None:
    adapter = adapter_for(given, wanted, is_fitted=is_fitted)
    inputs = torch.randn(5, *given[1:])
    assert adapter(inputs).shape == (5, *wanted[1:])
    if given == wanted and not is_fitted:
        assert identical(adapter(inputs), inputs)


def test_adapter_for_refuses_shapes_with_no_way_between() -> None:
    with pytest.raises(EditError, match=r"no usual way leads from \(1, 7, 4\) to \(1, 5, 4\)"):
        adapter_for((1, 7, 4), (1, 5, 4))


def test_stitch_closed_form_is_the_least_squares_solution() -> None:
    front = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    back = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    batches = [torch.randn(40, 6) for _ in range(3)]
    stitched = regraft.stitch(front, back, cut=("1", "1"), batches=batches)
    inputs = torch.cat(batches)
    with torch.no_grad():
        given, wanted = front[:2](inputs).double().numpy(), back[:2](inputs).double().numpy()
        found = stitched.adapter(front[:2](inputs)).double().numpy()
    rows = np.hstack([given, np.ones((len(given), 1))])
    solution, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    best = ((rows @ solution - wanted) ** 2).sum()
    assert ((found - wanted) ** 2).sum() <= best * (1 + 1e-4)


def test_stitch_of_a_network_to_itself_is_itself_again() -> None:
    model = models.resnet18().eval()
    images = [torch.randn(4, 3, 224, 224) for _ in range(2)]
    stitched = regraft.stitch(model, model, cut=("layer2", "layer2"), batches=images).eval()
    with torch.no_grad():
        assert torch.allclose(stitched(images[0]), model(images[0]), atol=1e-3)


def test_stitch_takes_batches_with_labels_and_gives_tokens_their_class() -> None:
    front, back = models.resnet18().eval(), models.VisionTransformer(64, 16, 2, 2, 24, 48).eval()
    pairs = [(torch.randn(4, 3, 224, 224), torch.zeros(4))]
    stitched = regraft.stitch(front, back, cut=("layer3", "encoder.layers.encoder_layer_0"), batches=pairs)
    assert stitched.adapter[-1].token.detach().abs().sum() > 0
    assert stitched(pairs[0][0]).shape == (4, 1000)


@pytest.mark.parametrize("is_fitted", [False, True])
def test_stitch_is_saved_and_loaded(tmp_path: Path, is_fitted: bool) -> None:
    front = regraft.create_model("resnet18", weights="none")
    back = regraft.create_model("mobilenet_v3_small", weights="none")
    images = [torch.randn(2, 3, 224, 224)]
    stitched = regraft.stitch(front, back, cut=("layer2", "features.8"), batches=images if is_fitted else None)
    stitched = regraft.replace_head(stitched, 4).eval()
    again = regraft.load(regraft.save(stitched, tmp_path / "stitched.safetensors"))
    with torch.no_grad():
        assert identical(again(images[0]), stitched(images[0]))
    copied = copy.deepcopy(stitched)
    with torch.no_grad():
        assert identical(copied(images[0]), stitched(images[0]))


WRONG = [
    (("layer9", "layer2"), {}, SelectionError, r"no layer 'layer9'"),
    (("layer2", "layer3.0.conv1"), {}, EditError, r"a skip connection crosses the cut.*Nearest clean cuts"),
    (
        ("layer2", "layer3"),
        {"adapter": "none"},
        EditError,
        r"the front gives \(1, 128, 28, 28\), the back expects \(1, 256, 14",
    ),
    (("layer2", "layer3"), {"adapter": "best"}, EditError, r"no adapter 'best'"),
    (("layer2", "layer3"), {"adapter": nn.Conv2d(3, 3, 1)}, EditError, r"would be given \(1, 128, 28, 28\)"),
    (("layer2", "layer3"), {"batches": []}, EditError, r"there are no batches"),
    (
        ("layer2", "layer2"),
        {"batches": [torch.ones(2, 3, 64, 64)]},
        EditError,
        r"of shape \(2, 3, 64, 64\): 128 places of the front do not meet the shape \(2, 128, 28, 28\) of the back",
    ),
]


@pytest.mark.parametrize(("cut", "options", "kind", "message"), WRONG)
def test_stitch_that_cannot_be_made_changes_nothing(
    cut: tuple[str, str], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    front, back = models.resnet18(), models.resnet18()
    before = snapshot(front), snapshot(back)
    with pytest.raises(kind, match=message):
        regraft.stitch(front, back, cut=cut, **options)
    assert same(before[0], snapshot(front))
    assert same(before[1], snapshot(back))


@pytest.mark.parametrize(("change", "what"), [({"dtype": torch.float64}, "dtypes"), ({"device": "meta"}, "devices")])
def test_stitch_refuses_parts_of_different_kinds(change: dict[str, Any], what: str) -> None:
    with pytest.raises(EditError, match=f"cannot stitch networks of different {what}"):
        regraft.stitch(models.resnet18(), models.resnet18().to(**change), cut=("layer1", "layer2"))


def test_graft_puts_backbones_side_by_side_with_several_heads(tmp_path: Path) -> None:
    left = regraft.truncate(regraft.create_model("resnet18", weights="none"), drop=1)
    right = regraft.truncate(regraft.create_model("mobilenet_v3_small", weights="none"), after="features")
    both = regraft.graft({"left": left, "right": right}, {"colour": 3, "kind": nn.Linear(512 + 576, 5)}).eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        vectors = torch.cat([left.eval()(inputs), right.eval()(inputs).mean((2, 3))], 1)
        found = both(inputs)
        assert identical(found["kind"], both.heads["kind"](vectors))
        assert found["colour"].shape == (2, 3)
        again = regraft.load(regraft.save(both, tmp_path / "both.safetensors"))
        assert all(identical(again(inputs)[name], found[name]) for name in found)
    sum(scores.sum() for scores in both.train()(inputs).values()).backward()
    assert left.conv1.weight.grad is not None


def test_graft_of_one_backbone_with_one_head_gives_scores() -> None:
    backbone = regraft.truncate(models.resnet18(), after="layer2")
    model = regraft.graft(backbone, 4)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(EditError, match="takes 7 features, the backbones give 128"):
        regraft.graft(backbone, nn.Linear(7, 2))
    with pytest.raises(EditError, match="at least one backbone and one head"):
        regraft.graft({}, 3)
