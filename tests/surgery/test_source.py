"""Written sources run in a process without regraft, and give what the network gives, bit for bit."""

import ast
import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import tiny
from oracles import identical, same, snapshot
from regraft import append, create_model, freeze, insert, replace, to_source, truncate
from regraft.errors import EditError
from regraft.surgery.codegen.literals import Constants, wrapped
from regraft.zoo import preprocessing_of

SIDES = {"inception_v3": 299}  # of images, where training needs larger ones than evaluation
SPREAD = """
    convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vit_b_32
"""
FEW_OF_TIMM = "timm/test_vit timm/test_byobnet timm/lcnet_035"
MORE = """
    alexnet densenet161 efficientnet_v2_s regnet_x_400mf resnext50_32x4d swin_v2_s vgg11_bn convnext_base
    timm/convnext_atto timm/convnextv2_atto timm/levit_128s timm/deit_tiny_distilled_patch16_224
    timm/vit_tiny_patch16_224 timm/eva02_tiny_patch14_224 timm/cait_xxs24_224 timm/xcit_nano_12_p16_224 timm/pit_ti_224
    timm/tiny_vit_5m_224 timm/coat_lite_tiny timm/crossvit_9_240 timm/pvt_v2_b0 timm/edgenext_xx_small
    timm/efficientformer_l1 timm/fastvit_t8 timm/poolformer_s12 timm/resmlp_12_224 timm/gmlp_ti16_224
    timm/mobilenetv3_small_050 timm/mobilenetv4_conv_small_035 timm/ghostnet_050 timm/tinynet_e timm/semnasnet_050
    timm/repvgg_a0 timm/regnetx_002 wide_resnet50_2 timm/resnet10t timm/skresnet18 timm/dla46_c timm/hrnet_w18_small
    timm/ese_vovnet19b_slim_dw timm/test_nfnet timm/test_mambaout timm/starnet_s1 timm/tf_efficientnet_b0
    timm/tf_mobilenetv3_small_075 timm/swin_tiny_patch4_window7_224
"""
WORKER = """
import importlib.util, json, sys, traceback, torch
from torch.utils._pytree import tree_leaves
def run(job):
    spec = importlib.util.spec_from_file_location("written", job["source"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = torch.load(job["given"])
    model = getattr(module, job["name"])()
    model.load_state_dict(given["weights"], strict=True)
    found = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = model(*[value.clone() for value in given["inputs"]])
        found[mode] = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    torch.save({**found, "after": model.state_dict()}, job["found"])
    assert "regraft" not in sys.modules
for line in sys.stdin:
    try:
        run(json.loads(line))
        print("done", flush=True)
    except Exception:
        print(repr(traceback.format_exc()), flush=True)
"""
Check = Callable[..., str]
Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(scope="module")
def other_process() -> Iterator[subprocess.Popen[str]]:
    """Start a process that has torch and its libraries, but sees neither regraft nor the tests."""
    command = [sys.executable, "-I", "-W", "ignore", "-c", WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture
def check(tmp_path: Path, other_process: subprocess.Popen[str]) -> Check:
    """Return a function that writes a network, runs it elsewhere, compares, and returns the text."""

    def run(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> str:
        before = snapshot(model)
        text = to_source(model, inputs=inputs, **options)
        assert same(before, snapshot(model))
        assert max(map(len, text.splitlines())) <= 120
        files = {name: str(tmp_path / name) for name in ("source", "given", "found")}
        Path(files["source"]).with_suffix(".py").write_text(text)
        torch.save({"weights": model.state_dict(), "inputs": inputs}, files["given"])
        job = {**files, "source": files["source"] + ".py", "name": options.get("class_name", type(model).__name__)}
        assert other_process.stdin is not None
        assert other_process.stdout is not None
        other_process.stdin.write(json.dumps(job) + "\n")
        other_process.stdin.flush()
        assert other_process.stdout.readline() == "done\n"
        found = torch.load(files["found"])
        for mode in ("eval", "train"):
            model.train(mode == "train")
            torch.manual_seed(0)
            with torch.no_grad():
                outputs = model(*[value.clone() for value in inputs])
            expected = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
            assert len(found[mode]) == len(expected)
            assert all(identical(ours, theirs) for ours, theirs in zip(found[mode], expected, strict=True)), mode
        after = model.state_dict()
        assert found["after"].keys() == after.keys()
        assert [name for name in after if not identical(found["after"][name], after[name])] == []
        return text

    return run


def images(model: nn.Module, name: str) -> torch.Tensor:
    """Draw images of the smallest of a few sizes that a network takes."""
    for side in (SIDES.get(name, 64), preprocessing_of(model).size):
        drawn = torch.randn(2, 3, side, side)
        try:
            with torch.no_grad():
                model.eval()(drawn)
            return drawn
        except (RuntimeError, AssertionError, ValueError):
            continue
    raise AssertionError(f"{name} takes none")


@pytest.mark.parametrize("name", [*SPREAD.split(), *FEW_OF_TIMM.split()])
def test_to_source_of_every_family(name: str, check: Check) -> None:
    model = create_model(name, weights="none")
    check(model, images(model, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE.split())
def test_to_source_of_more_networks(name: str, check: Check) -> None:
    model = create_model(name, weights="none")
    check(model, images(model, name))


@pytest.mark.parametrize("name", sorted({*tiny.ALL} - {"root-token"}))
def test_to_source_of_tiny_networks(name: str, check: Check) -> None:
    text = check(tiny.build(name), tiny.batch(name))
    assert text == to_source(tiny.build(name, seed=2)), "weights have no part in it"


def test_to_source_of_resnet18_reads_like_torchvision() -> None:
    text = to_source(create_model("resnet18", weights="none"))
    assert "        y = self.layer2[0].bn2(y)\n        x = self.layer2[0].downsample(x)\n" in text
    assert "        x = self.layer2[0].relu(y + x)\n\n        # layer2.1: BasicBlock\n" in text
    assert "        x = torch.flatten(x, 1)\n        return self.fc(x)\n" in text
    assert len(text.splitlines()) < 200
    assert "= None" not in text


def test_to_source_of_edited_networks(check: Check) -> None:
    original = create_model("resnet18", weights="none")
    body = append(truncate(original, drop=1), nn.Linear(512, 40), nn.ReLU(), nn.Linear(40, 3))
    edited = insert(body, nn.Dropout(0.4), after="layer2.0.conv1")
    edited = replace(edited, "layer3.1.relu", nn.LeakyReLU(0.2))
    text = check(edited, torch.randn(2, 3, 64, 64))
    assert "self.appended_3 = nn.Linear(40, 3)" in text
    assert "class EditedResNet(nn.Module):" in text
    assert "# Edit: truncate(drop=1)" in text
    assert ".fc = " not in text


@pytest.mark.parametrize(
    ("name", "after", "side"),
    [
        ("alexnet", "features.6", 64),
        ("vit_b_32", "encoder.layers.encoder_layer_1", 224),
        ("densenet121", "features", 64),
    ],
)
def test_to_source_of_truncated_networks(name: str, after: str, side: int, check: Check) -> None:
    check(truncate(create_model(name, weights="none"), after=after), torch.randn(2, 3, side, side))


def test_to_source_of_a_frozen_network_has_no_pins(check: Check) -> None:
    model = tiny.build("plain")
    plain = to_source(model)
    freeze(model, "bn1")
    assert to_source(model) == plain


class Assorted(nn.Module):
    """Layers with arguments of their own, values that no state dict holds, shared and tied parts."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 6, 2, batch_first=True, dropout=0.5, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.1, batch_first=True)
        layer = nn.TransformerEncoderLayer(12, 2, 20, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.table = torch.randn(12)
        self.tables = [torch.randn(5, 12)]
        self.register_buffer("mask", torch.randn(40, 12) > 0, persistent=False)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.by_name = nn.ParameterDict({"a-b": nn.Parameter(torch.randn(12))})
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))])
        self.layers = nn.ModuleDict({"x-y": nn.Linear(12, 12), "relu": nn.ReLU()})
        self.wide = nn.Linear(12, 12).double()
        self.block = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.again = self.block
        self.tied = nn.Linear(12, 12, bias=False)
        self.tied.weight = self.block[0].weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, Any]:
        x, _ = self.lstm(x.unsqueeze(1).repeat(1, 5, 1) + shift)
        x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.table + self.tables[0]
        x = x * self.mask[3] * self.scale + self.by_name["a-b"] * self.listed[0] - self.listed[1]  # pyright: ignore
        x = self.wide(self.layers["relu"](self.layers["x-y"](x)).double()).float()
        x = self.again(self.block(x)) + self.tied(x)
        x = -(x**2) + (x - (x - 1)) * 2 / (3 + x * x) - (1 - x)
        x = F.dropout(x.view(x.shape[0], -1, x.size(2)), 0.3, self.training)
        return {"mean": x.mean(1), "pair": Pair(x[:, 0, ::2], [x[..., None], float("inf")])}


def test_to_source_of_layers_with_state_of_their_own(check: Check) -> None:
    text = check(Assorted(), torch.randn(4, 12), torch.randn(4, 1, 12))
    assert "nn.LSTM(12, 6, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True)" in text
    assert "self.tied.weight = self.block[0].weight" in text
    assert 'Pair = namedtuple("Pair", ["first", "second"])' in text
    assert "training=self.training" in text


def test_to_source_leaves_tied_and_shared_parts_shared() -> None:
    text = to_source(Assorted(), inputs=(torch.randn(4, 12), torch.randn(4, 1, 12)))
    scope: dict[str, Any] = {"__name__": "written"}
    exec(text, scope)
    made = scope["Assorted"]()
    assert made.again is made.block
    assert made.tied.weight is made.block[0].weight
    assert [tensor.dtype for tensor in made.wide.parameters()] == [torch.float64] * 2
    assert {name for name, _ in made.named_buffers()} - {*made.state_dict()} == {"mask", "table", "constant0"}


def test_to_source_has_no_unused_imports_and_the_name_asked_for() -> None:
    text = to_source(tiny.build("plain"), class_name="Digits")
    tree = ast.parse(text)
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == {"nn", "F"}
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} >= imported
    assert "class Digits(nn.Module):" in text


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if x.sum() > 0 else x


class Aliased(nn.Module):
    """Changes in place what has a second name, which torch.fx does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        y = x
        y += 1
        return x * y


def hooked() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Untraceable, "Untraceable cannot be traced: its own forward .* depends on values or shapes"),
        (Aliased, "gives other values, probably as its forward changes in place"),
        (hooked, r"'0' \(Linear\) carries a forward hook \(WeightNorm\), which a source file would not run"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "a lazy layer has no shapes yet. Run the model once"),
        (lambda: append(Untraceable(), nn.ReLU()), "it was cut or extended by hooks"),
    ],
)
def test_to_source_refuses_what_it_cannot_write_with_the_reason(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(EditError, match=message):
        to_source(make(), inputs=torch.randn(2, 4))


def test_to_source_names_a_layer_that_timm_does_not_trace() -> None:
    with pytest.raises(EditError, match=r"layer 'stages.2.1' \(MobileVitBlock\) depends on .* cannot be read back"):
        to_source(create_model("timm/mobilevit_xxs", weights="none"))


def test_to_source_refuses_a_bad_class_name() -> None:
    with pytest.raises(EditError, match=r"'my net' is no name for a class\. Pass class_name="):
        to_source(tiny.build("plain"), class_name="my net")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, -2]),
        torch.tensor(float("nan")),
        torch.tensor([0.0, -0.0]),
        torch.randn(3, 50),
        torch.randn(30).bfloat16(),
        torch.arange(99),
        torch.zeros(4, 5, 6),
        torch.full((40,), 7, dtype=torch.int32),
        torch.rand(100) > 0.5,
        torch.randn(6, 7).t(),
        torch.zeros(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_constants_come_back_bit_for_bit(tensor: torch.Tensor) -> None:
    constants = Constants()
    text = constants.of(tensor, "layer.table")
    scope: dict[str, Any] = {"torch": torch}
    exec("import base64, zlib\n" + "\n".join(constants_helper()) + "\n" + "\n".join(constants.lines), scope)
    assert identical(eval(text, scope), tensor)


def constants_helper() -> list[str]:
    from regraft.surgery.codegen.literals import UNPACK

    return UNPACK.splitlines()


def test_wrapped_breaks_long_lines_without_a_change_of_meaning() -> None:
    line = f"x = call([{', '.join(f'{number} + 1' for number in range(60))}], 'a, (b', key=(1, 2))"
    lines = wrapped(line, 8)
    assert max(map(len, lines)) <= 120
    assert ast.dump(ast.parse("if 1:\n" + "\n".join(lines))) == ast.dump(ast.parse(f"if 1:\n {line}"))
