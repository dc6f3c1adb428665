"""What people really have: wrapped, prefixed, pickled and half fitting files."""

import importlib.util
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models, transforms

import tiny
from marking import Marked
from oracles import identical, same, snapshot
from regraft import create_model, load_weights, save
from regraft.card import card_of
from regraft.errors import CheckpointError, TrustError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXAMPLE = Path(__file__).parents[2] / "examples" / "mobilenet_v1.py"


class CifarBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - channels_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skipped = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(skipped, (0, 0, 0, 0, self.added // 2, self.added // 2)))


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2, with identity shortcuts (option A)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = CifarBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [CifarBlock(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class MnistMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_1, self.layer_2, self.layer_3 = nn.Linear(784, 128), nn.Linear(128, 256), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_3(F.relu(self.layer_2(F.relu(self.layer_1(x.flatten(1))))))


def unit(channels_in: int, channels: int, kernel: int | tuple[int, int], groups: int = 1) -> nn.Module:
    """Build the convolution and the norm of MiniFASNet's units, under the names of its checkpoint."""
    layers = {"conv": nn.Conv2d(channels_in, channels, kernel, groups=groups, bias=False)}
    return nn.ModuleDict(layers | {"bn": nn.BatchNorm2d(channels), "prelu": nn.PReLU(channels)})


def example_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mobilenet_v1_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REAL: dict[str, tuple[str, Callable[[], nn.Module], tuple[str, ...]]] = {
    "MobileNetV1": (
        "mobilenetV1X0.25_pretrain.tar",
        lambda: example_module().MobileNetV1(),
        ("taken from the entry 'state_dict'", "prefix 'module.' stripped"),
    ),
    "ResNet-20": (
        "resnet20-12fca82f.th",
        lambda: CifarResNet(3),
        ("taken from the entry 'state_dict'", "prefix 'module.' stripped"),
    ),
    "ResNet-56": (
        "resnet56-4bfd9763.th",
        lambda: CifarResNet(9),
        ("taken from the entry 'state_dict'", "prefix 'module.' stripped"),
    ),
    "MLP": (
        "mnist-epoch=04-val_accuracy=0.88391.ckpt",
        MnistMlp,
        ("taken from the entry 'state_dict'",),
    ),
}


def by_hand(path: Path) -> dict[str, torch.Tensor]:
    """Read a file with torch alone."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in content.get("state_dict", content).items()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("file", "make", "notes"), REAL.values(), ids=list(REAL))
def test_load_weights_loads_real_files_whole(
    file: str, make: Callable[[], nn.Module], notes: tuple[str, ...], shared: Path
) -> None:
    model, path = make(), shared / "weights" / file
    report = load_weights(model, path, strict=True)
    assert report.notes == notes
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    expected = by_hand(path)
    assert set(report.loaded) == set(expected)
    assert all(identical(expected[name], model.state_dict()[name]) for name in expected)


LEFT_OUT = {
    "MobileNetV1": {"epoch", "arch", "best_acc1", "optimizer"},
    "ResNet-20": {"best_prec1"},
    "ResNet-56": {"best_prec1"},
    "MLP": {"epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers", "hyper_parameters"},
}


@pytest.mark.parametrize("name", REAL)
def test_load_weights_reports_what_was_taken_off_and_left_out_of_a_real_file(name: str, shared: Path) -> None:
    file, make, notes = REAL[name]
    report = load_weights(make(), shared / "weights" / file)
    assert LEFT_OUT[name] <= set(report.left_out)
    assert not {"state_dict"} & set(report.left_out)
    assert {match.sure for match in report.matches} == {"certain"}
    assert report.share == 1.0
    shown = str(report)
    assert all(note in shown for note in notes)
    assert f"left out: {report.left_out[0]}" in shown


def test_load_weights_fills_the_first_layers_from_a_real_bare_dict_with_pruned_widths(shared: Path) -> None:
    model = nn.ModuleDict({"conv1": unit(3, 32, 3), "conv2_dw": unit(32, 32, 3, groups=32)})
    report = load_weights(model, shared / "weights" / "2.7_80x80_MiniFASNetV2.pth")
    assert report.notes == ("prefix 'module.' stripped",)
    assert (report.missing, report.mismatched) == ((), ())
    assert len(report.unexpected) == 334 - len(report.loaded)
    assert report.loaded == tuple(model.state_dict())


def photos(folder: Path, steps: list[Callable[[object], object]]) -> torch.Tensor:
    """Read up to 30 photos with torchvision alone."""
    prepared = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    return torch.stack([prepared(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())[:30]])


def test_load_weights_gives_a_real_network_that_recognises_real_cars(shared: Path) -> None:
    model = CifarResNet(9).eval()
    load_weights(model, shared / "weights" / "resnet56-4bfd9763.th")
    cars = photos(shared / "data" / "car_vs_bike" / "val" / "car", [transforms.Resize((32, 32))])
    with torch.no_grad():
        assert (model(cars).argmax(1) == 1).float().mean() > 0.7  # CIFAR-10's class 1: automobile


@pytest.mark.parametrize(("name", "place"), [("bees", 0), ("ants", 1)])
def test_load_weights_gives_a_real_network_that_tells_real_ants_from_bees(name: str, place: int, shared: Path) -> None:
    model = example_module().MobileNetV1().eval()
    load_weights(model, shared / "weights" / "mobilenetV1X0.25_pretrain.tar")
    steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    with torch.no_grad():
        scores = model(photos(shared / "data" / "hymenoptera" / "val" / name, steps))
    assert (scores[:, [309, 310]].argmax(1) == place).float().mean() > 0.9  # ImageNet's classes bee and ant


def plain_state(seed: int = 3) -> OrderedDict[str, torch.Tensor]:
    return tiny.build("plain", seed=seed).state_dict()


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in plain_state().items()}


WRAPPED: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "bare": (plain_state, ()),
    "state_dict": (lambda: {"epoch": 3, "state_dict": plain_state()}, ("taken from the entry 'state_dict'",)),
    "model": (lambda: {"model": plain_state(), "optimizer": {}}, ("taken from the entry 'model'",)),
    "model_state_dict": (lambda: {"model_state_dict": plain_state()}, ("taken from the entry 'model_state_dict'",)),
    "ema": (lambda: {"ema": plain_state()}, ("taken from the entry 'ema'",)),
    "nested": (
        lambda: {"checkpoint": 1, "model": {"state_dict": plain_state()}},
        ("taken from the entry 'model'", "taken from the entry 'state_dict'"),
    ),
    "tensor beside": (
        lambda: {"best": torch.tensor(0.5), "state_dict": plain_state()},
        ("taken from the entry 'state_dict'",),
    ),
    "module.": (lambda: renamed("module."), ("prefix 'module.' stripped",)),
    "model.": (lambda: renamed("model."), ("prefix 'model.' stripped",)),
    "_orig_mod.": (lambda: renamed("_orig_mod."), ("prefix '_orig_mod.' stripped",)),
    "backbone.": (lambda: renamed("backbone."), ("prefix 'backbone.' stripped",)),
    "two prefixes": (
        lambda: {"state_dict": renamed("module._orig_mod.")},
        ("taken from the entry 'state_dict'", "prefix 'module.' stripped", "prefix '_orig_mod.' stripped"),
    ),
    "half": (lambda: {name: tensor.half() for name, tensor in plain_state().items()}, ()),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("content", "notes"), WRAPPED.values(), ids=list(WRAPPED))
def test_load_weights_takes_wrappers_and_prefixes_off(
    content: Callable[[], object], notes: tuple[str, ...], legacy: bool, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=not legacy)
    model = tiny.build("plain")
    report = load_weights(model, path, strict=True)
    assert report.notes == notes
    tolerance = 2e-3 if content is WRAPPED["half"][0] else 0.0
    for name, tensor in plain_state().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=tolerance, atol=tolerance / 10), name
        assert model.state_dict()[name].dtype == tensor.dtype


def test_load_weights_adds_a_prefix_where_the_model_has_one(tmp_path: Path) -> None:
    torch.save(plain_state(), tmp_path / "weights.pth")
    model = nn.ModuleDict({"backbone": tiny.build("plain")})
    report = load_weights(model, tmp_path / "weights.pth", strict=True)
    assert report.notes == ("prefix 'backbone.' added",)


def test_load_weights_rewrites_names(tmp_path: Path) -> None:
    torch.save({name.replace("conv", "c"): tensor for name, tensor in plain_state().items()}, tmp_path / "w.pth")
    report = load_weights(tiny.build("plain"), tmp_path / "w.pth", rename={r"^c(\d)\.": r"conv\1."}, strict=True)
    assert len(report.loaded) == len(plain_state())


def test_load_weights_reports_another_head_and_keeps_it(tmp_path: Path) -> None:
    torch.save(tiny.PlainCnn(num_classes=9).state_dict(), tmp_path / "w.pth")
    model = tiny.build("plain")
    head = model.fc.weight.detach().clone()
    report = load_weights(model, tmp_path / "w.pth")
    assert report.mismatched == (("fc.weight", (9, 128), (5, 128)), ("fc.bias", (9,), (5,)))
    assert identical(model.fc.weight, head)
    assert "'fc.weight' is (9, 128) in the file and (5, 128) in the model" in str(report)


def test_load_weights_counts_missing_and_unexpected_names(tmp_path: Path) -> None:
    state = plain_state()
    del state["bn1.weight"], state["bn1.num_batches_tracked"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"1 tensors of PlainCnn \(bn1.weight\), 0.5% of its parameters without"):
        report = load_weights(tiny.build("plain"), tmp_path / "w.pth")
    assert report.missing == report.gaps == ("bn1.weight",)
    assert report.unexpected == ("extra.weight",)
    assert "1 missing (bn1.weight), 1 unexpected (extra.weight)" in str(report)


HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "whole module": lambda path, marker: torch.save(tiny.build("plain"), path),
    "reduce": lambda path, marker: torch.save({"state_dict": plain_state(), "extra": Marked(marker)}, path),
    "reduce, legacy": lambda path, marker: torch.save(
        {"state_dict": plain_state(), "extra": Marked(marker)}, path, _use_new_zipfile_serialization=False
    ),
    "plain pickle": lambda path, marker: path.write_bytes(pickle.dumps(Marked(marker))),
}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ("whole module", "holds more than tensors (tiny.PlainCnn), and reading it would run code from it"),
        ("reduce", "holds more than tensors (posix.mkdir), and reading it would run code from it"),
        ("reduce, legacy", "holds more than tensors (posix.mkdir), and reading it would run code from it"),
        ("plain pickle", "cannot be read as weights"),
    ],
)
def test_load_weights_refuses_a_file_that_would_run_code(write: str, message: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "w.pth", tmp_path / "it ran"
    HOSTILE[write](path, marker)
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert not marker.exists()
    assert same(before, snapshot(model))


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, object], str]] = {
    "nothing fits": (
        lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
        {},
        "nothing in '{path}' fits PlainCnn: the file has 'weight' (2, 2), 'bias' (2,), the model 'conv1.weight'",
    ),
    "strict, missing": (
        lambda path: torch.save({"conv1.weight": plain_state()["conv1.weight"]}, path),
        {"strict": True},
        "does not fit PlainCnn in all: 1 tensors loaded",
    ),
    "strict, mismatched": (
        lambda path: torch.save(tiny.PlainCnn(num_classes=9).state_dict(), path),
        {"strict": True},
        "'fc.weight' is (9, 128) in the file",
    ),
    "a list": (lambda path: torch.save([1, 2], path), {}, "holds no state dict, but [1, 2]"),
    "no tensors": (lambda path: torch.save({"a": 1}, path), {}, "holds no state dict, but a dict with 'a'"),
    "text": (lambda path: path.write_text("weights"), {}, "it is text, which begins 'weights'. Expected safetensors"),
    "empty": (lambda path: path.touch(), {}, "it is empty (0 bytes). The download or the copy failed: get it again."),
    "missing": (lambda path: None, {}, "no file '{path}'"),
}


@pytest.mark.parametrize(("write", "options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_load_weights_changes_nothing_where_it_fails(
    write: Callable[[Path], object], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    write(path)
    model = tiny.build("plain")
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path, **options)
    assert message.format(path=path) in str(caught.value)
    assert same(before, snapshot(model))


def test_load_weights_leaves_frozen_weights_frozen(tmp_path: Path) -> None:
    torch.save(plain_state(), tmp_path / "w.pth")
    model = tiny.build("plain").requires_grad_(False)
    load_weights(model, tmp_path / "w.pth", strict=True)
    assert identical(model.fc.weight, plain_state()["fc.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_load_weights_reads_shared_tensors_back_under_every_name(tmp_path: Path) -> None:
    path = save(tiny.build("tied", seed=4), tmp_path / "tied.safetensors")
    model = tiny.build("tied")
    assert load_weights(model, path, strict=True).missing == ()
    assert model.decoder.weight is model.encoder.weight
    assert identical(model.encoder.weight, tiny.build("tied", seed=4).encoder.weight)


def test_create_model_puts_a_real_backbone_under_a_new_head(shared: Path) -> None:
    file = shared / "weights" / "mobilenetV1X0.25_pretrain.tar"
    model = create_model(f"py:{EXAMPLE}:MobileNetV1", weights=file, num_classes=2, trust_code=True)
    assert model.fc.out_features == 2
    expected = by_hand(file)
    assert all(identical(t, expected[name]) for name, t in model.state_dict().items() if not name.startswith("fc."))
    recipe = card_of(model).recipe
    assert recipe is not None
    assert recipe.source.weights == file.name


def test_create_model_refuses_weights_of_another_architecture(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing in '.*resnet20-12fca82f.th' fits ResNet"):
        create_model("resnet18", weights=shared / "weights" / "resnet20-12fca82f.th")
    torch.save(models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(CheckpointError, match=r"another architecture than resnet18: it has 'layer1\.2\.conv1\.weight'"):
        create_model("resnet18", weights=tmp_path / "resnet34.pth")
    torch.save(models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"architecture than resnet34: it lacks 'layer1\.2\.conv1\.weight'"):
        create_model("resnet34", weights=tmp_path / "resnet18.pth")


def test_create_model_imports_no_class_of_ones_own_without_trust() -> None:
    with pytest.raises(TrustError, match="names Python code, which would run with your rights"):
        create_model(f"py:{EXAMPLE}:MobileNetV1")
