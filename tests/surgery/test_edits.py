"""An edit equals the original's own activation, leaves the original alone, and says why where it cannot be made."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

import regraft
import tiny
from oracles import identical, same, snapshot
from regraft.anatomy.modes import evaluation_mode
from regraft.card import card_of
from regraft.errors import EditError, SelectionError
from surgery.models import first

CUTS = [
    ("plain", "bn1"),
    ("plain", "conv2"),
    ("residual", "stem_norm"),
    ("root-token", "block"),
    ("sequential", "0"),
    ("aux-head", "bn"),
    ("input-norm", "conv"),
    ("tied", "norm"),
    ("functional-dropout", "block1"),
]


def run(model: nn.Module, inputs: torch.Tensor) -> Any:
    with evaluation_mode(model), torch.no_grad():
        return model(inputs)


def tapped(model: nn.Module, path: str, inputs: torch.Tensor) -> torch.Tensor:
    """Return what a layer gives, as a forward hook sees it."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    run(model, inputs)
    handle.remove()
    return seen[-1]


def existing(name: str, path: str) -> str:
    """Return the path, or the first layer of the network where it has no such."""
    layers = dict(tiny.build(name).named_modules())
    return path if path in layers else next(key for key in layers if key)


@pytest.mark.parametrize(("name", "path"), CUTS)
def test_truncate_gives_what_the_layer_gave(name: str, path: str) -> None:
    model, inputs = tiny.build(name), tiny.batch(name)
    path = existing(name, path)
    before = snapshot(model)
    cut = regraft.truncate(model, after=path, drop_skips=True)
    assert identical(run(cut, inputs), tapped(model, path, inputs))
    assert same(before, snapshot(model))
    assert set(cut.state_dict()) < set(model.state_dict())
    assert all(tensor is dict(model.named_parameters())[key] for key, tensor in cut.named_parameters())


@pytest.mark.parametrize("name", tiny.ALL)
def test_insert_of_an_identity_changes_nothing_in_either_mode(name: str) -> None:
    model, inputs = tiny.build(name), tiny.batch(name)
    path = [name for name, layer in model.named_children() if next(layer.parameters(), None) is not None][1]
    edited = regraft.insert(model, nn.Identity(), after=path)
    assert list(edited.state_dict()) == list(model.state_dict())
    reference = copy.deepcopy(model)
    for mode in (False, True):
        torch.manual_seed(3)
        expected = first(reference.train(mode)(inputs))
        torch.manual_seed(3)
        assert identical(first(copy.deepcopy(edited).train(mode)(inputs)), expected)


@pytest.mark.parametrize("name", tiny.ALL)
def test_append_takes_the_output(name: str) -> None:
    model, inputs = tiny.build(name), tiny.batch(name)
    top = nn.Linear(tiny.CLASSES, 3)
    edited = regraft.append(model, top, nn.Tanh())
    assert identical(run(edited, inputs), torch.tanh(top(first(run(model, inputs)))).detach())
    assert [key for key in edited.state_dict() if key not in model.state_dict()] == [
        "appended_1.weight",
        "appended_1.bias",
    ]


@pytest.mark.parametrize("name", tiny.ALL)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_append_and_insert_give_a_network_that_can_be_copied(name: str, way: str) -> None:
    model, inputs = tiny.build(name), tiny.batch(name)
    edited = regraft.append(regraft.insert(model, nn.Identity(), after=existing(name, "conv1")), nn.ReLU())
    again = copy.deepcopy(edited) if way == "deepcopy" else pickle.loads(pickle.dumps(edited))
    assert identical(run(again, inputs), run(edited, inputs))
    assert list(again.state_dict()) == list(edited.state_dict())
    assert not {id(p) for p in again.parameters()} & {id(p) for p in edited.parameters()}


def test_truncate_append_insert_and_replace_head_edit_edited_networks() -> None:
    model = models.resnet18().eval()
    inputs = torch.randn(2, 3, 64, 64)
    features = regraft.truncate(model, after="layer3.0")
    longer = regraft.append(features, nn.Conv2d(256, 8, 1), nn.ReLU())
    wider = regraft.insert(longer, nn.BatchNorm2d(8), after="appended_1")
    assert identical(run(wider, inputs), F.relu(wider.inserted_1(wider.appended_1(tapped(model, "layer3.0", inputs)))))
    back = regraft.truncate(wider, drop=2)
    assert identical(run(back, inputs), wider.appended_1(tapped(model, "layer3.0", inputs)))
    again = regraft.truncate(back, after="layer2.1")
    assert identical(run(again, inputs), tapped(model, "layer2.1", inputs))
    assert regraft.replace_head(regraft.append(features, 5), 7)(inputs).shape == (2, 7)


@pytest.mark.parametrize(
    ("drop", "last", "shape"), [(1, "avgpool", (2, 512)), (2, "layer4", (2, 512, 2, 2)), (3, "layer3", (2, 256, 4, 4))]
)
def test_truncate_leaves_functional_steps_with_the_layer_that_they_follow(
    drop: int, last: str, shape: tuple[int, ...]
) -> None:
    model, inputs = models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    assert identical(run(regraft.truncate(model, drop=drop), inputs), tapped(model, last, inputs).reshape(shape))


def test_insert_after_a_layer_that_is_called_twice_follows_it_twice() -> None:
    model = models.resnet18().eval()
    calls: list[int] = []

    class Counted(nn.Identity):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return input

    edited = regraft.insert(model, Counted(), after="layer1.0.relu")
    calls.clear()
    assert identical(run(edited, torch.ones(1, 3, 64, 64)), run(model, torch.ones(1, 3, 64, 64)))
    assert len(calls) == 2


def test_append_and_insert_give_lazy_layers_their_widths() -> None:
    model = regraft.truncate(models.resnet18(), after="layer2")
    edited = regraft.append(model, nn.LazyConv2d(7, 1), nn.Flatten(), nn.LazyLinear(3))
    assert (edited.appended_1.in_channels, edited.appended_3.in_features) == (128, 7 * 28 * 28)
    widened = regraft.insert(model, nn.LazyBatchNorm2d(), after="layer1")
    assert type(widened.inserted_1) is nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_append_gives_new_layers_the_dtype_and_the_mode_of_the_old(dtype: torch.dtype) -> None:
    model = tiny.build("plain").to(dtype).eval()
    edited = regraft.append(model, nn.Linear(tiny.CLASSES, 2), nn.Dropout())
    assert edited.appended_1.weight.dtype == dtype
    assert not edited.appended_2.training
    assert edited(tiny.batch("plain").to(dtype)).dtype == dtype


def test_append_leaves_what_is_frozen_frozen_and_what_is_new_trains() -> None:
    model = tiny.build("plain")
    regraft.freeze(model)
    top = nn.Sequential(nn.BatchNorm1d(tiny.CLASSES), nn.Dropout(), nn.Linear(tiny.CLASSES, 2))
    edited = regraft.append(model, top).train()
    assert top.training
    assert top[0].training
    assert not edited.bn1.training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = regraft.build_optimizer("sgd", edited, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        edited(tiny.batch("plain")).square().sum().backward()
        optimizer.step()
    assert all(identical(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_append_and_insert_end_auxiliary_scores_with_the_cut(name: str) -> None:
    model = models.get_model(name, weights=None, init_weights=False)
    images = torch.randn(2, 3, *[299 if name == "inception_v3" else 64] * 2)
    edited = regraft.append(model, nn.Linear(1000, 3)).train()
    assert edited(images).shape == (2, 3)
    inserted = regraft.insert(model, nn.Identity(), after="avgpool").train()
    assert type(inserted(images)).__name__ == type(model.train()(images)).__name__


def test_replace_takes_every_kind_of_layer_and_keeps_what_fits() -> None:
    model = models.resnet18().eval()
    with torch.no_grad():
        model.bn1.weight.uniform_()
    edited = regraft.replace(model, "type:BatchNorm2d", lambda old: nn.GroupNorm(8, old.num_features))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in edited.modules())
    assert identical(edited.bn1.weight, model.bn1.weight)
    assert edited.conv1.weight is model.conv1.weight
    both = regraft.replace(model, "type:ReLU", nn.GELU())
    kinds = [layer for layer in both.modules() if isinstance(layer, nn.GELU)]
    assert len(kinds) == sum(isinstance(layer, nn.ReLU) for layer in model.modules())


def test_remove_passes_a_layer_by() -> None:
    model = models.resnet18().eval()
    inputs = torch.randn(1, 3, 64, 64)
    edited = regraft.remove(model, "layer3.1")
    assert not any(name.startswith("layer3.1") for name in edited.state_dict())
    assert identical(tapped(edited, "layer3", inputs), tapped(model, "layer3.0", inputs))


@pytest.mark.parametrize("edit", ["truncate", "append", "insert", "remove", "replace", "replace_head", "replace_stem"])
def test_edits_take_networks_without_weights_without_memory(edit: str) -> None:
    with torch.device("meta"):
        config = {"image_size": 224, "patch_size": 16, "num_heads": 16, "mlp_dim": 8192}
        model = models.VisionTransformer(num_layers=20, hidden_dim=2048, **config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1_000_000_000
    block = "encoder.layers.encoder_layer_3"
    edits: dict[str, Callable[[], nn.Module]] = {
        "truncate": lambda: regraft.truncate(model, after=block),
        "append": lambda: regraft.append(model, nn.Linear(1000, 3)),
        "insert": lambda: regraft.insert(model, nn.Identity(), after=block),
        "remove": lambda: regraft.remove(model, block),
        "replace": lambda: regraft.replace(model, "type:GELU", nn.ReLU()),
        "replace_head": lambda: regraft.replace_head(model, 3),
        "replace_stem": lambda: regraft.replace_stem(model, 1),
    }
    assert all(parameter.is_meta for parameter in edits[edit]().parameters())


def resnet() -> nn.Module:
    return models.resnet18()


WRONG: list[tuple[str, Callable[[nn.Module], object], str]] = [
    ("unknown path", lambda m: regraft.truncate(m, after="layer5"), r"no layer 'layer5' in ResNet. Nearest: 'layer"),
    ("unknown place", lambda m: regraft.insert(m, nn.ReLU(), after="layer3.7"), r"no layer 'layer3.7'"),
    (
        "width of an appended layer",
        lambda m: regraft.append(m, nn.Linear(512, 10)),
        r"'appended_1' \(Linear\) would be given \(1, 1000\), and expects \(…, 512\). Make it nn.Linear\(1000, 10\)",
    ),
    (
        "a map where a vector is expected",
        lambda m: regraft.append(regraft.truncate(m, after="layer4"), nn.Linear(512, 10)),
        r"would be given \(1, 512, 7, 7\).* Put nn.AdaptiveAvgPool2d\(1\) and nn.Flatten\(\) before it",
    ),
    (
        "channels of an inserted layer",
        lambda m: regraft.insert(m, nn.Conv2d(64, 64, 1), after="layer2"),
        r"'inserted_1' \(Conv2d\) would be given \(1, 128, 28, 28\), and expects \(N, 64, …, …\)",
    ),
    (
        "channels after an inserted layer",
        lambda m: regraft.insert(m, nn.Conv2d(128, 64, 1), after="layer2"),
        r"would be given \(1, 64, 28, 28\), and expects \(N, 128, …, …\). Put nn.Conv2d\(64, 128, 1\) before it",
    ),
    (
        "another shape",
        lambda m: regraft.remove(m, "layer3.0"),
        r"takes \(1, 128, 28, 28\) and gives \(1, 256, 14, 14\)",
    ),
    (
        "no way through",
        lambda m: regraft.replace(m, "fc", nn.Linear(3, 3)),
        r"'fc' \(Linear\) would be given \(1, 512\)",
    ),
    ("inside of a block", lambda m: regraft.truncate(m, after="layer3.0.conv1"), r"a skip connection crosses the cut"),
    ("nothing left", lambda m: regraft.truncate(m, drop=10), r"calls 10 top-level layers: conv1, bn1, relu"),
    ("no number of layers", lambda m: regraft.truncate(m, drop=0), r"drop is 0, expected"),
    ("neither", lambda m: regraft.truncate(m), r"either after=PATH or drop=NUMBER"),
    ("both", lambda m: regraft.insert(m, nn.ReLU(), after="fc", before="fc"), r"either after=PATH or before=PATH"),
    ("no layer", lambda m: regraft.append(m), r"needs at least one layer"),
    ("the whole", lambda m: regraft.replace(m, "", nn.ReLU()), r"the model itself cannot be replaced"),
    ("a maker that fails", lambda m: regraft.replace(m, "fc", lambda old: 1 / 0), r"ZeroDivisionError"),
    ("no channels", lambda m: regraft.replace_stem(m, 0), r"at least 1 channel"),
    ("classes to keep", lambda m: regraft.replace_head(m, 3, keep={0: 3}), r"the new class 3, expected .* 0 to 2"),
    ("classes twice", lambda m: regraft.replace_head(m, 3, keep={0: 1, 5: 1}), r"two old classes the same new one"),
]


@pytest.mark.parametrize(("edit", "message"), [pytest.param(e, m, id=name) for name, e, m in WRONG])
def test_edits_that_cannot_be_made_change_nothing(edit: Callable[[nn.Module], object], message: str) -> None:
    model = resnet()
    before = snapshot(model)
    with pytest.raises((EditError, SelectionError)) as caught:
        edit(model)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert same(before, snapshot(model))


def test_edits_work_by_the_ways_out_that_are_named() -> None:
    model = resnet()
    features = regraft.truncate(model, after="layer4")
    assert regraft.append(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))(zeros()).shape == (1, 10)
    assert regraft.append(model, nn.Linear(1000, 10))(zeros()).shape == (1, 10)
    halved = nn.Sequential(nn.Conv2d(128, 64, 1), nn.Conv2d(64, 128, 1))
    assert regraft.insert(model, halved, after="layer2")(zeros()).shape == (1, 1000)
    for clean in ("layer2", "layer3.0"):  # named by the error of a cut after layer3.0.conv1
        regraft.truncate(model, after=clean)


def zeros() -> torch.Tensor:
    return torch.zeros(1, 3, 64, 64)


def test_truncate_may_leave_only_what_is_frozen_but_not_nothing() -> None:
    model = resnet()
    regraft.freeze(model, until="layer2")
    assert not any(parameter.requires_grad for parameter in regraft.truncate(model, after="layer1").parameters())
    with pytest.raises(EditError, match="no layer with parameters would be left"):
        regraft.truncate(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), after="0", inputs=torch.zeros(1, 12))
    assert regraft.append(regraft.truncate(model, after="layer1"), 3)(zeros()).shape == (1, 3)


def test_truncate_and_append_refuse_scripted_and_compiled_networks() -> None:
    small = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        scripted = torch.jit.script(small)
    with pytest.raises(EditError, match="TorchScript module"):
        regraft.truncate(scripted, drop=1)
    with pytest.raises(EditError, match="is compiled, which an edit would not reach"):
        regraft.append(torch.compile(small), nn.ReLU())


def test_edits_are_steps_of_the_recipe() -> None:
    model = regraft.create_model("resnet18", weights="none")
    model = regraft.replace_stem(model, 1)
    model = regraft.remove(model, "layer4.1")
    model = regraft.insert(model, nn.Conv2d(128, 128, 1), before="layer3")
    model = regraft.append(regraft.truncate(model, drop=1), nn.LazyLinear(4))
    recipe = card_of(model).recipe
    assert recipe is not None
    assert [str(step) for step in recipe.steps] == [
        "replace_stem(channels=1)",
        "remove(path='layer4.1')",
        "insert(new='Conv2d(128, 128, 1)', before='layer3')",
        "truncate(drop=1)",
        "append(layers=['Linear(512, 4)'])",
    ]


def test_append_gives_a_half_new_network_that_trains_saves_and_loads(tmp_path: Any) -> None:
    loaded = regraft.create_model("resnet18", weights="none", num_classes=300)
    file = regraft.save(loaded, tmp_path / "300.safetensors")
    model = regraft.truncate(regraft.load(file), drop=1)
    model = regraft.append(model, nn.Linear(512, 400), nn.ReLU(), nn.Linear(400, 300))
    regraft.freeze(model, until="layer3.0")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = regraft.build_optimizer("sgd", model, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(torch.randn(2, 3, 64, 64)), torch.tensor([3, 5])).backward()
        optimizer.step()
    frozen = [name for name in before if re.match(r"conv1|bn1|layer1|layer2|layer3\.0", name)]
    assert all(identical(before[name], tensor) for name, tensor in model.state_dict().items() if name in frozen)
    assert not identical(before["layer3.1.conv1.weight"], model.state_dict()["layer3.1.conv1.weight"])
    again = regraft.load(regraft.save(model, tmp_path / "edited.safetensors"))
    inputs = torch.randn(2, 3, 64, 64)
    assert identical(run(again, inputs), run(model, inputs))


def test_replace_leaves_the_random_state_where_a_function_draws_and_fails() -> None:
    def failing(old: nn.Module) -> nn.Module:
        torch.rand(3)
        raise ValueError("no such layer")

    state = torch.get_rng_state()
    with pytest.raises(EditError, match=r"the new layer raised ValueError: no such layer\. Nothing was changed"):
        regraft.replace(tiny.build("plain"), "conv2", failing)
    assert torch.equal(torch.get_rng_state(), state)
