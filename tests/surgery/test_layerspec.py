"""What is described is built again, equal in all that can be compared; what cannot be described is refused."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm import layers as timm_layers
from torch import nn
from torch.nn import functional as F

import __main__
import tiny
from regraft.errors import EditError, TrustError
from regraft.surgery.layer_text.build import MAX_ELEMENTS, construct, construct_all, describe
from regraft.zoo import import_object

OWN_FILE = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width, *, act=None, sizes=(1, 2), bias=True):
        super().__init__()
        self.width, self.act, self.sizes = width, act or nn.ReLU(), sizes
        self.inner = nn.Linear(width, width, bias=bias)
        self.bias = self.inner.bias

    def forward(self, x):
        return self.act(self.inner(x))

class Doubled(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.width = width * 2

class Values(nn.Module):
    def __init__(self, depth):
        super().__init__()
        import torch
        self.depth = depth
        self.layers = nn.ModuleList([nn.Dropout(p.item()) for p in torch.linspace(0, 0.5, depth)])

class Any(nn.Module):
    def __init__(self, *sizes):
        super().__init__()

number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN_FILE)
    return file


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)), "Conv2d(3, 8, 3, padding=1)"),
        (nn.MaxPool2d(2, 2), "MaxPool2d(2)"),
        (nn.Dropout(np.float64(0.25)), "Dropout(p=0.25)"),
        (nn.Dropout(np.float64(0.5)), "Dropout()"),
        (nn.LayerNorm((5,)), "LayerNorm(5)"),
        (nn.MultiheadAttention(8, 2, kdim=8), "MultiheadAttention(8, 2)"),
        (nn.TransformerEncoderLayer(8, 2, activation=F.gelu), "TransformerEncoderLayer(8, 2, activation='gelu')"),
        (nn.Sequential(nn.ReLU(), nn.Tanh())[1:], "Sequential({'1': Tanh()})"),
        (nn.Linear(2, 2).half().eval().requires_grad_(False), "Linear(2, 2)"),
        (nn.BatchNorm1d(2, affine=False), "BatchNorm1d(2, affine=False)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_describe_is_minimal(layer: nn.Module, text: str) -> None:
    assert describe(layer) == text


def test_construct_reads_short_and_long_alike() -> None:
    for text in ("nn.Linear(3,4)", " torch.nn.Linear(in_features=3,\n out_features=4) ", "Linear(3, 4, True,)"):
        assert describe(construct(text)) == "Linear(3, 4)"


def test_construct_all_reads_several_layers_between_commas() -> None:
    layers = construct_all("Linear(512,400), ReLU(), Linear(400,300)")
    assert [describe(layer) for layer in layers] == ["Linear(512, 400)", "ReLU()", "Linear(400, 300)"]
    assert [describe(layer) for layer in construct_all("ReLU()")] == ["ReLU()"]
    with pytest.raises(EditError, match=r"holds 2 layers, expected one. Write Sequential\(…\) around them"):
        construct("ReLU(), Tanh()")


def test_describe_takes_shared_layers_in_each_place_where_nothing_is_tied() -> None:
    model = tiny.sequential()
    text = describe(model)
    assert text.count("ReLU()") == 3
    assert construct(text).eval()(tiny.batch("sequential")).min() >= 0  # the last activation is there


@pytest.mark.parametrize("kind", ["layer", "weight", "buffers"])
def test_describe_refuses_tied_layers(kind: str) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    norm = nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(*{"layer": (first, first), "weight": (first, second), "buffers": (norm, norm)}[kind])
    with pytest.raises(
        EditError, match=r"are one tensor, and text would untie them. Give each layer weights of its own"
    ):
        describe(model)
    assert describe(model, tied=True).startswith("Sequential(")


def local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return Local()


def changed(layer: Any, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def main_class() -> nn.Module:
    kind = type("Script", (nn.Module,), {"__module__": "__main__"})
    return kind()


UNDESCRIBABLE = {
    "own class without its argument": (
        tiny.NoisyBlock(3),
        "a layer of type tiny.NoisyBlock cannot be written as text: its argument 'width' cannot be read back, as it "
        "has no attribute of that name. Keep it: self.width = width, as the constructor was given it.",
    ),
    "inside": (nn.Sequential(nn.ReLU(), tiny.NoisyBlock(3)), "a layer of type tiny.NoisyBlock at '1' cannot"),
    "local": (local_class(), "defined inside of a function or another class. Move the class to the top level"),
    "main": (
        main_class(),
        "in a notebook or an interactive session, so that no file holds it. Move the class to the top level",
    ),
    "parametrized": (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "its class was made at run time"),
    "traced": (torch.fx.symbolic_trace(nn.ReLU()), "its class is defined inside of a function"),
    "tensor": (nn.CrossEntropyLoss(weight=torch.ones(3)), "its argument 'weight' is a Tensor, no plain value"),
    "function": (nn.TransformerEncoderLayer(4, 2, 8, activation=F.silu), "its argument 'activation' is a function"),
    "not a number": (nn.ConstantPad1d(1, float("nan")), "its argument 'value' is a float, no plain value (nan)"),
    "other activation": (timm_layers.BatchNormAct2d(4, act_layer=nn.SiLU), "the layers in it are not those of"),
    "by hand": (changed(nn.Module(), inner=nn.ReLU()), "the layers in it are not those of 'Module()'"),
    "more weights": (changed(nn.Linear(2, 2), extra=nn.Parameter(torch.ones(1))), "its tensors are not those of"),
    "other layer in a block": (
        changed(nn.TransformerEncoderLayer(4, 2, 8), dropout1=nn.Dropout(0.9)),
        "a layer of type Dropout at 'dropout1' cannot be written as text: its 'p' is 0.9, and that of",
    ),
    "its forward": (changed(nn.ReLU(), forward=torch.tanh), "its forward was replaced"),
    "no layers": (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 0), "has no layers"),
    "too deep": (
        nn.Sequential(*[layer := nn.Sequential(), *[layer := nn.Sequential(layer) for _ in range(60)]][-1:]),
        "nested more than 50 deep",
    ),
}


@pytest.mark.parametrize(("layer", "message"), UNDESCRIBABLE.values(), ids=list(UNDESCRIBABLE))
def test_describe_refuses_what_it_cannot_describe(
    layer: nn.Module, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "Script", type(layer), raising=False)
    with pytest.raises(EditError) as caught:
        describe(layer)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Linaer(3, 4)", "'Linaer' is no layer of torch.nn. Nearest: 'Linear'"),
        ("linear(3, 4)", "'linear' is no layer of torch.nn. Nearest: 'Linear'"),
        ("nothing(3)", "'nothing' is no layer of torch.nn"),
        ("Parameter(3)", "'Parameter' is no layer of torch.nn"),
        ("__class__()", "'__class__' is no layer of torch.nn"),
        ("functional()", "'functional' is no layer of torch.nn"),
        ("timm.layers.DropPaht()", "'timm.layers.DropPaht' is no layer of timm.layers. Nearest: 'DropPath'"),
        ("timm.models.vgg.ConvMlp(3)", "is no layer: 'timm.models.vgg' may not be called"),
        (
            "Linear(512)",
            "'Linear(512)' cannot be built: missing a required argument: 'out_features'. "
            "Expected Linear(in_features, out_features, bias=True).",
        ),
        ("Linear(3, 4, wings=2)", "got an unexpected keyword argument 'wings'. Expected Linear(in_features, out_"),
        ("LSTM(3)", "Expected LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False"),
        ("Linear('a', 4)", "'Linear('a', 4)' cannot be built: "),
        ("Linear(ReLU(), 4)", "'Linear(ReLU(), 4)' cannot be built: "),
        ("Conv2d(3, 8, 3, groups=2)", "cannot be built: in_channels must be divisible by groups"),
        ("Sequential(3)", "'Sequential(3)' cannot be built: int is not a Module subclass"),
        ("Sequential(ReLU(), a=ReLU())", "'Sequential(ReLU(), a=ReLU())' cannot be built: "),
        ("Sequential({'a.b': ReLU()})", "module name can't contain"),
        ("Linear(3, 4, device='cuda')", "says where its weights live"),
        ("Linear(3, 4, True, 'meta')", "says where its weights live"),
        ("Linear(3, 4, dtype='float16')", "says where its weights live or of which dtype they are"),
        ("Linear(1000000000, 1000000000)", f"1,000,000,001,000,000,000 weights, and no more than {MAX_ELEMENTS:,}"),
        ("Sequential(Embedding(100000000, 100), Embedding(100000000, 101))", "20,100,000,000 weights"),
        ("BatchNorm1d(30000000000, affine=False)", "60,000,000,001 weights"),
        ("Linear(9223372036854775807, 9223372036854775807)", "cannot be built"),
        (f"Linear({10**40}, 1)", "cannot be built"),
        ("LSTM(2, 2, num_layers=1000000000)", "asks for 1,000,000,000 layers, and 1,000 are the most"),
        ("LSTM(2, 2, 1000000000)", "asks for 1,000,000,000 layers"),
        ("TransformerEncoder(ReLU(), 1000000000)", "asks for 1,000,000,000 layers"),
        ("py()", "'py()' does not name a class. A class of your own is py('FILE.py:Class', …)."),
        ("py(3)", "'py(3)' does not name a class"),
    ],
)
def test_construct_refuses_a_description_of_anything_else(text: str, message: str) -> None:
    with pytest.raises(EditError) as caught:
        construct(text)
    assert message in str(caught.value)


def test_construct_draws_no_more_than_the_weights() -> None:
    torch.manual_seed(1)
    built: Any = construct("Sequential(Linear(3, 2), LazyLinear(3))")
    torch.manual_seed(1)
    assert torch.equal(built[0].weight, nn.Linear(3, 2).weight)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    describe(built)
    assert torch.equal(torch.get_rng_state(), before)


def test_describe_names_the_file_of_a_class_and_construct_builds_it_with_trust_alone(own: Path) -> None:
    kind = import_object(f"py:{own}:Block", trust_code=True)
    layer = nn.Sequential(kind(3, act=nn.Tanh(), sizes=[4]), kind(2, bias=False))
    text = f"Sequential(py('{own}:Block', 3, act=Tanh(), sizes=[4]), py('{own}:Block', 2, act=ReLU(), bias=False))"
    assert describe(layer) == text
    built = construct(text, trust_code=True)
    assert describe(built) == text
    built.load_state_dict(layer.state_dict())
    assert torch.equal(built[0](torch.ones(1, 3)), layer[0](torch.ones(1, 3)))  # type: ignore[index]
    own.unlink()
    with pytest.raises(TrustError, match="trust_code=True"):
        construct(text)
    with pytest.raises(EditError, match=r"builds no such layer \(no file"):
        describe(layer)


def test_construct_imports_nothing_without_trust(tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "bad.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for text in (f"py('{tmp_path}/bad.py:Block')", f"Sequential(Linear(1, 1), py('{tmp_path}/bad.py:Block', 3))"):
        with pytest.raises(TrustError):
            construct(text)
    with pytest.raises(EditError, match="'Linaer' is no layer"):
        construct(f"Sequential(py('{tmp_path}/bad.py:Block'), Linaer(1, 1))", trust_code=True)
    assert not marker.exists()


def test_describe_names_the_module_of_a_class_in_a_module() -> None:
    assert describe(nn.Sequential(tiny.RootToken())) == "Sequential(py('tiny:RootToken'))"
    assert isinstance(construct("py('tiny:RootToken')", trust_code=True), tiny.RootToken)
    assert describe(tiny.Tied()) == "py('tiny:Tied')"  # its constructor ties what it ties


def test_describe_proves_what_a_class_of_ones_own_keeps(own: Path) -> None:
    with pytest.raises(EditError, match=r"its 'width' is 4, and that of .* is 8"):
        describe(import_object(f"py:{own}:Doubled", trust_code=True)())
    with pytest.raises(EditError, match=r"\*sizes does not record the arguments it was built with"):
        describe(import_object(f"py:{own}:Any", trust_code=True)(1))
    with pytest.raises(EditError, match="is a int, expected a class of layers"):
        construct(f"py('{own}:number')", trust_code=True)
    values = import_object(f"py:{own}:Values", trust_code=True)(3)  # cannot be built on the meta device
    assert describe(values) == f"py('{own}:Values', 3)"
    values.layers[2].p = 0.9
    with pytest.raises(EditError, match=r"a layer of type Dropout at 'layers.2' .* its 'p' is 0.9"):
        describe(values)


def test_describe_finds_a_class_that_was_imported_by_name_alone(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(own.parent))
    layer = construct("py('own:Block', 3)", trust_code=True)
    assert describe(layer) == "py('own:Block', 3, act=ReLU())"
    monkeypatch.delitem(sys.modules, "own")
