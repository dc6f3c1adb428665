"""Tensors that are made to fit: positions, first convolutions, heads; and each is reported."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_networks import Named, SmallResNet, hugging_face_vit, seeded, timm_vit
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

import tiny
from oracles import identical, same, snapshot
from regraft import load_weights
from regraft.errors import CheckpointError, InputError


def written(state: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize(("before", "after"), [(32, 16), (16, 24)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3},
        {"reg_tokens": 2, "no_embed_class": True},
    ],
    ids=["class token", "none embedded", "no token", "registers", "registers, none embedded"],
)
def test_load_weights_resamples_positions_as_timm_does(before: int, after: int, options: dict, tmp_path: Path) -> None:
    trained = seeded(lambda: timm_vit(before, **options), 3).state_dict()
    model = timm_vit(after, seed=1, **options)
    expected = checkpoint_filter_fn(dict(trained), model, interpolation="bicubic", antialias=True)
    report = load_weights(model, written(trained, tmp_path))
    assert [change.kind for change in report.adapted] == ["positions"]
    assert report.mismatched == ()
    for name, tensor in model.state_dict().items():
        assert identical(tensor, expected[name]), name


def test_load_weights_keeps_the_position_of_class_tokens(tmp_path: Path) -> None:
    trained = seeded(lambda: timm_vit(32, reg_tokens=3), 3).state_dict()
    model = timm_vit(16, reg_tokens=3)
    load_weights(model, written(trained, tmp_path))
    assert identical(model.pos_embed[:, :4], trained["pos_embed"][:, :4])


def test_load_weights_takes_positions_of_a_network_without_a_grid_as_a_square(tmp_path: Path) -> None:
    trained = seeded(lambda: Named(hugging_face_vit()), 3).state_dict()
    larger = hugging_face_vit() | {"embeddings.position_embeddings": (1, 17, 8)}
    model = seeded(lambda: Named(larger), 1)
    report = load_weights(model, written(trained, tmp_path))
    assert [change.kind for change in report.adapted] == ["positions"]
    found = model.get_parameter("embeddings.position_embeddings")
    assert identical(found[:, :1], trained["embeddings.position_embeddings"][:, :1])
    grid = trained["embeddings.position_embeddings"][:, 1:].reshape(1, 2, 2, 8).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    assert torch.allclose(found[:, 1:], resized.flatten(2).transpose(1, 2), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.* keep the values that they had")
@pytest.mark.parametrize("length", [4, 7, 19], ids=["fewer tokens", "no square", "no square, longer"])
def test_load_weights_keeps_values_of_positions_that_are_no_grid(length: int, tmp_path: Path) -> None:
    shapes = hugging_face_vit() | {"embeddings.position_embeddings": (1, length, 8)}
    trained = seeded(lambda: Named(shapes), 3).state_dict()
    model = seeded(lambda: Named(hugging_face_vit()), 1)
    before = model.get_parameter("embeddings.position_embeddings").detach().clone()
    report = load_weights(model, written(trained, tmp_path))
    assert report.mismatched == (("embeddings.position_embeddings", (1, length, 8), (1, 5, 8)),)
    assert identical(model.get_parameter("embeddings.position_embeddings"), before)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1), (3, 5), (4, 2), (1, 2)])
def test_load_weights_adapts_a_first_convolution_to_other_channels(theirs: int, ours: int, tmp_path: Path) -> None:
    trained = seeded(lambda: SmallResNet(channels=theirs), 3).eval()
    model = seeded(lambda: SmallResNet(channels=ours), 1).eval()
    report = load_weights(model, written(trained.state_dict(), tmp_path))
    assert [change.what for change in report.adapted] == [
        f"filters for {theirs} channels made to take {ours}, {(4, theirs, 3, 3)} → {(4, ours, 3, 3)}"
    ]
    images = torch.rand(2, 1, 8, 8)
    if 1 in (theirs, ours):  # a gray image answers as it did, however many channels show it
        answers = [network(images.expand(-1, count, -1, -1)) for network, count in ((trained, theirs), (model, ours))]
        assert torch.allclose(*answers, rtol=1e-4)
    elif ours > theirs:  # new channels say nothing yet
        images = torch.rand(2, ours, 8, 8)
        assert torch.allclose(trained(images[:, :theirs]), model(images), rtol=1e-4)
    else:
        assert torch.allclose(model.conv1.weight, trained.conv1.weight[:, :ours] * theirs / ours)


@pytest.mark.filterwarnings("ignore:.* keep the values that they had")
def test_load_weights_adapts_the_first_convolution_only(tmp_path: Path) -> None:
    state = seeded(SmallResNet, 3).state_dict()
    state["layer1.0.conv1.weight"] = torch.rand(4, 3, 3, 3)
    report = load_weights(SmallResNet(), written(state, tmp_path))
    assert report.adapted == ()
    assert [name for name, _, _ in report.mismatched] == ["layer1.0.conv1.weight"]


@pytest.mark.filterwarnings("ignore:.* keep the values that they had")
def test_load_weights_adapts_nothing_where_that_is_not_wanted(tmp_path: Path) -> None:
    path = written(seeded(lambda: SmallResNet(channels=1), 3).state_dict(), tmp_path)
    model = SmallResNet()
    before = model.conv1.weight.detach().clone()
    report = load_weights(model, path, adapt=())
    assert report.mismatched == (("conv1.weight", (4, 1, 3, 3), (4, 3, 3, 3)),)
    assert identical(model.conv1.weight, before)


@pytest.mark.parametrize("classes", [3, 9])
def test_load_weights_takes_the_first_classes_where_that_is_asked_for(classes: int, tmp_path: Path) -> None:
    trained = seeded(lambda: SmallResNet(classes), 3).state_dict()
    model = seeded(SmallResNet, 1)
    before = model.fc.weight.detach().clone()
    report = load_weights(model, written(trained, tmp_path), adapt=("head",))
    rows = min(classes, 5)
    assert identical(model.fc.weight[:rows], trained["fc.weight"][:rows])
    assert identical(model.fc.weight[rows:], before[rows:])
    assert [change.name for change in report.adapted] == ["fc.weight", "fc.bias"]
    assert f"the first {rows} classes taken" in str(report)
    assert ("the other 2 keep their values" in str(report)) == (classes == 3)


def test_load_weights_keeps_the_values_of_a_head_for_other_classes(tmp_path: Path) -> None:
    trained = tiny.PlainCnn(num_classes=9).state_dict()
    report = load_weights(tiny.build("plain"), written(trained, tmp_path), min_share=1.0)
    assert report.share == 1.0  # of all but the head, which is more than half of the network
    assert "the head 'fc' is for 9 classes in the file and for 5 in the model" in report.cause
    assert "adapt=('positions', 'stem', 'head')" in report.suggestion


@pytest.mark.filterwarnings("ignore:.* keep the values that they had")
def test_load_weights_does_not_cast_numbers_of_another_kind(tmp_path: Path) -> None:
    state = seeded(SmallResNet, 3).state_dict()
    state["layer1.0.conv1.weight"] = torch.ones(4, 4, 3, 3, dtype=torch.int8)
    report = load_weights(SmallResNet(), written(state, tmp_path))
    assert report.mismatched == (("layer1.0.conv1.weight", (4, 4, 3, 3), (4, 4, 3, 3)),)
    assert "another kind of numbers (layer1.0.conv1.weight), as in a quantized network" in report.cause


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return SmallResNet()


def expanded() -> nn.Module:
    model = SmallResNet()
    model.fc.bias = nn.Parameter(torch.zeros(1).expand(5))
    return model


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (on_meta, r"'conv1.weight' of SmallResNet is on the meta device.*to_empty\(device='cpu'\)"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0.weight' of Sequential is lazy.*Run the model once"),
    "unwritable": (expanded, r"'fc.bias' cannot be loaded from '.*': .*Nothing was changed"),
}


@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=list(UNFIT))
def test_load_weights_leaves_a_model_that_it_cannot_fill_as_it_was(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    path = written(seeded(SmallResNet, 3).state_dict(), tmp_path)
    model = make()
    before = (
        {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.device.type == "cpu"}
        if (make is expanded)
        else {}
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, path)
    assert all(identical(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_load_weights_undoes_a_copy_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(seeded(SmallResNet, 3).state_dict(), tmp_path)
    model = SmallResNet()
    before = snapshot(model)
    copied, original = [], torch.Tensor.copy_

    def interrupted(self: torch.Tensor, *args: object) -> torch.Tensor:
        copied.append(self)
        made = original(self, *args)
        if len(copied) == 9:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, path)
    monkeypatch.undo()
    assert same(before, snapshot(model))


def test_load_weights_needs_one_of_tied_tensors_and_refuses_two_values(tmp_path: Path) -> None:
    state = tiny.build("tied", seed=4).state_dict()
    one = {name: tensor for name, tensor in state.items() if name != "decoder.weight"}
    model = tiny.build("tied")
    report = load_weights(model, written(one, tmp_path), strict=True)
    assert report.missing == ()
    assert model.decoder.weight is model.encoder.weight
    assert identical(model.decoder.weight, state["encoder.weight"])
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"'encoder.weight' and 'decoder.weight' are one tensor in the model"):
        load_weights(model, written(state | {"decoder.weight": torch.rand(12, 12)}, tmp_path))
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "order"}, "match is 'order', expected 'names' or 'shapes'"),
        ({"accept": "all"}, "accept is 'all', expected one of certain, likely, guess"),
        ({"adapt": "stem"}, "adapt is 'stem', expected a list"),
        ({"min_share": 50}, "min_share is 50, expected a number from 0 to 1"),
        ({"rename": {"(": ""}}, "is no regular expression with its replacement"),
        ({"rename": {"a": r"\1"}}, "is no regular expression with its replacement"),
        ({"rename": {r"\d": ""}}, "makes 'conv.weight' of 'conv1.weight' and of 'conv2.weight'"),
        ({"entry": "ema"}, "has no entry 'ema'"),
    ],
)
def test_load_weights_names_a_wrong_option(options: dict, message: str, tmp_path: Path) -> None:
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(InputError) as caught:
        load_weights(model, written(tiny.build("plain", 3).state_dict(), tmp_path), **options)
    assert message in str(caught.value)
    assert same(before, snapshot(model))
