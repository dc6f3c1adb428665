"""What is loaded is what was saved, bit for bit, and a failed write leaves what was there before."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from torch import nn

import regraft
import tiny
from checkpoint.altered import assert_equal, flipped, rewritten, shake
from oracles import identical, same, snapshot
from regraft import Preprocessing, create_model, freeze, load, load_weights, replace_head, save, unfreeze
from regraft.card import attach, card_of
from regraft.checkpoint import current_versions, read_header
from regraft.checkpoint.file import layout
from regraft.errors import CheckpointError, RegraftError, RunError, TrustError
from regraft.freezing.pins import is_pinned

MADE: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: create_model("mobilenet_v3_small", weights="none"),
    "torchvision with a head": lambda: create_model("squeezenet1_1", weights="none", num_classes=3),
    "timm": lambda: create_model("timm/test_resnet", weights="none"),
    "timm, sensitive to where tensors lie": lambda: create_model("timm/mobilenetv3_small_050", weights="none"),
    "timm with two heads": lambda: create_model("timm/levit_128s", weights="none", num_classes=3),
    "sequential": lambda: tiny.build("sequential"),
    "sequential with a head": lambda: replace_head(tiny.build("sequential"), nn.Sequential(nn.Linear(6, 3), nn.Tanh())),
    "a module as head": lambda: replace_head(
        create_model("timm/test_vit", weights="none"), nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 3))
    ),
}


@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_load_gives_every_tensor_bit_equal(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = shake(make()).eval()
    path = save(model, tmp_path / "model.safetensors")
    assert path == tmp_path / "model.safetensors"
    loaded = load(path)
    assert_equal(loaded, model)
    kinds = [[type(layer) for _, layer in m.named_modules(remove_duplicate=False)] for m in (loaded, model)]
    assert kinds[0] == kinds[1]
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize(
    "name", ["torchvision with a head", "timm", "timm, sensitive to where tensors lie", "sequential"]
)
def test_load_gives_bit_equal_outputs(name: str, tmp_path: Path) -> None:
    model = MADE[name]().eval()
    inputs = tiny.batch("plain") if name == "sequential" else torch.randn(2, 3, 64, 64)
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert identical(loaded(inputs), model(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_save_keeps_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = shake(tiny.build("sequential").to(dtype))
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert_equal(loaded, model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("layout", ["transposed", "slice of a larger tensor", "channels last", "expanded"])
def test_save_keeps_tensors_in_any_layout(layout: str, tmp_path: Path) -> None:
    if layout == "channels last":
        model = shake(tiny.build("sequential")).to(memory_format=torch.channels_last)
    else:
        model = nn.Sequential(nn.Linear(6, 6))
        model[0].weight.data = {
            "transposed": torch.randn(6, 6).t(),
            "slice of a larger tensor": torch.randn(100, 6)[3:9],
            "expanded": torch.randn(1, 6).expand(6, 6),
        }[layout]
    path = save(model, tmp_path / "model.safetensors")
    assert_equal(load(path), model)
    elements = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert path.stat().st_size < elements + 10_000


def test_load_rebuilds_a_class_of_ones_own_with_trust_alone(own: str, tmp_path: Path) -> None:
    model = shake(create_model(own, trust_code=True)).eval()
    path = save(model, tmp_path / "model.safetensors")
    marker = tmp_path / "imported"
    source = tmp_path / "own.py"
    source.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n" + source.read_text())
    with pytest.raises(TrustError, match="trust_code=True"):
        load(path)
    assert not marker.exists()
    loaded = load(path, trust_code=True)
    assert marker.exists()
    assert_equal(loaded, model)
    inputs = torch.randn(4, 12)
    assert identical(loaded(inputs), model(inputs))


def test_load_opens_the_file_once_and_parses_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(create_model("squeezenet1_1", weights="none"), tmp_path / "model.safetensors")
    parsed, opened = [], []
    parse = layout.parse_json
    monkeypatch.setattr(layout, "parse_json", lambda text: parsed.append(len(text)) or parse(text))

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and event == "open" and str(arguments[0]) == str(path):
            opened.append(event)

    is_watching = True
    sys.addaudithook(note)  # which sees the opens of all of Python, and cannot be taken off again
    load(path)
    is_watching = False
    assert (len(opened), len(parsed)) == (1, 1)


def test_load_leaves_tied_weights_tied(own: str, tmp_path: Path) -> None:
    model = create_model(own, trust_code=True)
    path = save(model, tmp_path / "model.safetensors")
    loaded = load(path, trust_code=True)
    assert loaded.twin.weight is loaded.body.weight
    with safe_open(path, "pt") as file:
        assert "twin.weight" not in file.keys()  # noqa: SIM118
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("tie", ["module", "weight"])
def test_load_leaves_weights_tied_that_were_tied_by_hand(tie: str, tmp_path: Path) -> None:
    first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    if tie == "module":
        first[2] = first[0]
    else:
        first[2].weight = first[0].weight
    loaded = load(save(first, tmp_path / "model.safetensors"))
    assert loaded[2].weight is loaded[0].weight
    assert (loaded[2].bias is loaded[0].bias) == (tie == "module")
    inputs = torch.randn(3, 4)
    assert identical(loaded(inputs), first(inputs))
    assert len(list(loaded.parameters())) == len(list(first.parameters()))


def test_load_restores_frozen_flags_and_pins(tmp_path: Path) -> None:
    model = create_model("mobilenet_v3_small", weights="none")
    freeze(model, until="features.5")
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert [is_pinned(module) for module in loaded.modules()] == [is_pinned(module) for module in model.modules()]
    assert any(is_pinned(module) for module in loaded.modules())
    loaded.train()
    assert not loaded.features[0][1].training
    unfreeze(loaded)
    loaded.train()
    assert loaded.features[0][1].training


def test_load_pins_nothing_in_a_model_that_was_never_frozen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert not any(is_pinned(module) for module in loaded.modules())


def test_load_restores_classes_preprocessing_task_and_metrics(tmp_path: Path) -> None:
    model = tiny.build("sequential")
    fields = {
        "classes": ("été", "a/b", "\n"),
        "task": "classification",
        "preprocessing": Preprocessing(size=8, resize=9, mean=(0.1,), std=(0.2,), interpolation="lanczos"),
        "metrics": {"accuracy": 0.1 + 0.2, "confusion": [[1, 2], [3, 4]]},
    }
    attach(model, **fields)
    path = save(model, tmp_path / "model.safetensors", metadata={"note": "mine"})
    card = card_of(load(path))
    assert {name: getattr(card, name) for name in fields} == fields
    header = read_header(path)
    assert header is not None
    assert header.metadata == {"note": "mine"}
    assert header.versions == current_versions()


@pytest.mark.filterwarnings("ignore:no recipe rebuilds this PlainCnn")
def test_load_answers_with_load_weights_where_a_custom_class_has_no_recipe(tmp_path: Path) -> None:
    model = tiny.build("plain")
    model.scale = 2.0
    path = save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) == (
        f"'{path}' has tensors but no recipe, so its architecture is unknown. "
        "Use load_weights(model, path) with a model of your own."
    )
    other = tiny.build("plain", seed=9)
    assert load_weights(other, path, strict=True).missing == ()
    assert_equal(other, model)


HAND_EDITS: dict[str, Callable[[nn.Module], object]] = {
    "width": lambda model: setattr(model, "fc", nn.Linear(512, 3)),
    "activation": lambda model: setattr(model, "relu", nn.GELU()),
    "no pooling": lambda model: setattr(model, "maxpool", nn.Identity()),
    "stride": lambda model: setattr(model, "conv1", nn.Conv2d(3, 64, 7, 1, 3, bias=False)),
}
UNWRITTEN_EDITS: dict[str, Callable[[nn.Module], object]] = {
    "one more layer": lambda model: model.layer1.append(nn.ReLU()),
    "one layer less": lambda model: model.layer1.pop(1),
    "a function": lambda model: setattr(model, "relu", Unwritten(lambda x: x.relu())),
}


@pytest.mark.parametrize("edit", HAND_EDITS.values(), ids=list(HAND_EDITS))
def test_save_notices_an_edit_by_hand_and_load_repeats_it(edit: Callable[[nn.Module], object], tmp_path: Path) -> None:
    model = create_model("resnet18", weights="none", num_classes=5)
    edit(model)
    loaded = load(save(shake(model), tmp_path / "model.safetensors"))
    assert_equal(loaded, model)
    assert str(loaded) == str(model)
    inputs = torch.randn(2, 3, 64, 64)
    assert identical(loaded(inputs), model.eval()(inputs))
    assert [step.operation for step in card_of(model).recipe.steps] == ["replace_head"]


@pytest.mark.parametrize("edit", UNWRITTEN_EDITS.values(), ids=list(UNWRITTEN_EDITS))
def test_save_notices_an_edit_by_hand_and_writes_no_recipe(edit: Callable[[nn.Module], object], tmp_path: Path) -> None:
    model = create_model("resnet18", weights="none")
    edit(model)
    with pytest.warns(UserWarning, match=r"no recipe rebuilds this ResNet.*: it no longer matches its recipe"):
        path = save(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no recipe"):
        load(path)
    assert card_of(model).recipe is not None


class Unwritten(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def fails_half_way(tensors: object, path: Path, metadata: object) -> None:
    Path(path).write_bytes(b"half a file")
    raise OSError(28, "No space left on device")


def test_save_that_fails_keeps_the_previous_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tiny.build("sequential"), tmp_path / "model.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", fails_half_way)
    with pytest.raises(RunError, match=r"cannot write '.*model\.safetensors': .*No space left on device"):
        save(tiny.build("sequential", seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="cannot write"):
        save(tiny.build("sequential"), tmp_path / "nowhere" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_save_writes_tensors_that_the_plain_safetensors_library_reads(tmp_path: Path) -> None:
    model = shake(tiny.build("sequential"))
    tensors = safetensors.torch.load_file(save(model, tmp_path / "model.safetensors"))
    assert tensors.keys() == model.state_dict().keys()
    assert all(identical(tensor, model.state_dict()[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["torchvision with a head", "sequential"])
def test_save_and_load_change_neither_the_model_nor_the_random_state(
    name: str, tmp_path: Path, random_state: Callable[[], tuple[object, ...]]
) -> None:
    model = MADE[name]().train()
    before, state = snapshot(model), random_state()
    path = save(model, tmp_path / "model.safetensors")
    load(path)
    assert random_state() == state
    assert same(before, snapshot(model))


def test_load_gives_a_model_that_does_not_depend_on_its_file(tmp_path: Path) -> None:
    model = tiny.build("sequential")
    path = save(model, tmp_path / "model.safetensors")
    loaded = load(path)
    with path.open("rb+") as file:  # in place, as a careless copy would
        file.write(b"\xff" * path.stat().st_size)
    assert_equal(loaded, model)


def test_save_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    model = tiny.build("sequential")
    assert save(model, tmp_path / "a").read_bytes() == save(model, tmp_path / "b").read_bytes()


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-10])
    return path


def wider(header: dict[str, object]) -> None:
    source = header["card"]["recipe"]["source"]
    source["layers"] = source["layers"].replace("Linear(6, 5)", "Linear(6, 9)")


def hostile(header: dict[str, object]) -> None:
    source = header["card"]["recipe"]["source"]
    source["layers"] = source["layers"].replace("ReLU()", "modules()", 1)


DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one bit": (flipped, "is not what was saved. Get or make it again."),
    "end missing": (cut, "is damaged"),
    "empty": (lambda path: (path.write_bytes(b""), path)[1], "it is empty (0 bytes). The download or the copy failed"),
    "text": (
        lambda path: (path.write_text("hello, hello, hello"), path)[1],
        "it is text, which begins 'hello, hello, hello'",
    ),
    "missing": (lambda path: path.with_name("other"), "no file"),
    "newer format": (lambda path: rewritten(path, lambda h: h.update(format="2.0")), "Install a newer regraft"),
    "other width": (lambda path: rewritten(path, wider), "does not match its own recipe at '7.weight'"),
    "no class of torch.nn": (lambda path: rewritten(path, hostile), "'modules' is no layer of torch.nn"),
    "not a header": (lambda path: rewritten(path, lambda h: h.update(digests=3)), "does not fit the format"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_load_says_how_a_file_is_damaged(damage: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = damage(save(tiny.build("sequential"), tmp_path / "model.safetensors"))
    with pytest.raises(RegraftError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "torch.nn" in message


def test_load_ignores_an_unknown_field_of_a_newer_minor_version(tmp_path: Path) -> None:
    model = shake(tiny.build("sequential"))
    path = save(model, tmp_path / "model.safetensors")
    rewritten(path, lambda header: header.update(format="1.9", novelty={"a": 1}))
    assert_equal(load(path), model)


def test_load_says_that_a_safetensors_file_of_others_has_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), path)
    with pytest.raises(CheckpointError, match="no recipe"):
        regraft.load(path)
    assert load_weights(timm.create_model("test_vit"), path, strict=True).missing == ()
