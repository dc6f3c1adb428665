"""Every kind of layer that has state: frozen it is bit-identical and gives the same, thawed it trains as if untouched.

The rest of the network is trained by hand with momentum, weight decay and bfloat16. The oracle of what thawing gives is
a second network that was never frozen.
"""

import copy
import io
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import regraft
from oracles import identical
from regraft import audit, freeze, unfreeze
from regraft.errors import ModelError
from regraft.freezing.hold import PIN_HOOKS, PinState
from regraft.freezing.pins import is_pinned

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:_aminmax is deprecated"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


class Codebook(nn.Module):
    """Adds codes that follow its inputs, written as published code writes them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("codes", torch.randn(3), persistent=how != "not persistent")
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, mean = self.codes.clone(), x.detach().float().mean((0, 2, 3))
        if self.how == "in training" and self.training:
            self.codes.lerp_(mean, 0.1)
        if self.how in ("always", "not persistent"):
            self.calls += 1
            self.codes.mul_(0.9).add_(mean, alpha=0.1)
        if self.how == "by data":
            self.codes.data.lerp_(mean, 0.1)
        if self.how == "by assignment":
            self.codes = self.codes.lerp(mean, 0.1)
        if self.how == "registered late" and not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(3))
        if self.how == "registered late" and self.training:
            self.late += mean
        return x + before[:, None, None]


class Growing(nn.Module):
    """A parametrization of the user's own with a buffer that moves in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale.mul_(1.1)
        return weight * self.scale


class FunctionalNoise(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Growing())
    return layer


def beside(layer: nn.Module) -> nn.Module:
    """Put a layer without parameters behind one that has some."""
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer)


def embedding(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(5)
    return layer


def image() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6)


def vector() -> torch.Tensor:
    return torch.randn(4, 8)


def sequence() -> torch.Tensor:
    return torch.randn(4, 5, 8)


def indices() -> torch.Tensor:
    return torch.randint(10, (4, 5))


class First(nn.Module):
    """The first output of a layer that gives several."""

    def __init__(self, layer: nn.Module, repeats: int = 1) -> None:
        super().__init__()
        self.layer, self.repeats = layer, repeats

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(*[x] * self.repeats)[0]


class Twice(First):
    """A layer that takes two inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x)


Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]
LAYERS: dict[str, Case] = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), image),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), image),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), image),
    "BatchNorm2d without affine": (lambda: beside(nn.BatchNorm2d(3, affine=False)), image),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3))).eval(), image),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), image),
    "GroupNorm": (lambda: nn.GroupNorm(3, 3), image),
    "LayerNorm": (lambda: nn.LayerNorm(8), vector),
    "RMSNorm": (lambda: nn.RMSNorm(8), vector),
    "Dropout": (lambda: beside(nn.Dropout(0.5)), image),
    "RReLU": (lambda: beside(nn.RReLU()), image),
    "PReLU": (lambda: nn.PReLU(3), image),
    "Bilinear": (lambda: Twice(nn.Bilinear(8, 8, 4)), vector),
    "dropout as a function": (lambda: FunctionalNoise(8, 8), vector),
    "LSTM": (lambda: First(nn.LSTM(8, 4, 2, dropout=0.5, batch_first=True)), sequence),
    "GRU": (lambda: First(nn.GRU(8, 4, 2, dropout=0.5, batch_first=True)), sequence),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), 3), sequence),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), sequence),
    "Embedding": (lambda: nn.Embedding(10, 4), indices),
    "Embedding, max_norm": (lambda: embedding(nn.Embedding(10, 4, max_norm=1.0)), indices),
    "Embedding, max_norm and padding": (
        lambda: embedding(nn.Embedding(10, 4, padding_idx=0, max_norm=1.0, norm_type=1.0)),
        indices,
    ),
    "EmbeddingBag, max_norm": (lambda: embedding(nn.EmbeddingBag(10, 4, max_norm=1.0)), indices),
    "spectral_norm of Conv2d": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), image),
    "spectral_norm of ConvTranspose2d": (lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 3)), image),
    "spectral_norm of Linear": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), vector),
    "parametrized spectral_norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), image),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), image),
    "parametrized weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), image),
    "parametrized orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), vector),
    "parametrization of one's own": (lambda: parametrized(nn.Linear(8, 8)), vector),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), image),
    "timm's BatchNormAct2d": (lambda: timm.layers.BatchNormAct2d(3), image),
    "timm's DropPath": (lambda: beside(timm.layers.DropPath(0.5)), image),
    "FrozenBatchNorm2d": (lambda: beside(torchvision.ops.FrozenBatchNorm2d(3)), image),
    "observer": (lambda: beside(torch.ao.quantization.MovingAverageMinMaxObserver()), image),
    "fake quantization": (lambda: beside(torch.ao.quantization.FakeQuantize()), image),
    **{
        f"codebook, {how}": (lambda how=how: beside(Codebook(how)), image)
        for how in ("in training", "always", "by data", "by assignment", "not persistent", "registered late")
    },
}
FLOAT32 = {"fake quantization", "observer", "LSTM"}  # not made for bfloat16 on every CPU


def build(name: str) -> nn.Module:
    """Build a network of the layer `name` and a head, as `regraft` would find it: after some training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        make, draw = LAYERS[name]
        layer, inputs = make(), draw()
        with torch.no_grad():
            width = layer(inputs).flatten(1).shape[1]
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 2))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def train(model: nn.Module, name: str, seed: int, steps: int = 3) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
        for _ in range(steps):
            model.train()
            inputs = LAYERS[name][1]()
            with torch.autocast("cpu", torch.bfloat16, enabled=name not in FLOAT32):
                loss = model(inputs).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("name", LAYERS)
def test_freeze_keeps_layers_bit_identical_and_their_outputs_the_same(name: str) -> None:
    model, inputs = build(name), LAYERS[name][1]()
    freeze(model, "0")
    before, expected = tensors(model[0]), model.train()[0](inputs).detach()
    train(model, name, seed=1)
    model.eval()(inputs)
    with torch.inference_mode():
        model(inputs)
    after = tensors(model[0])
    assert [key for key in before if not identical(before[key], after[key])] == []
    assert identical(model.train()[0](inputs), expected)
    assert audit(model) == []


@pytest.mark.parametrize("name", LAYERS)
def test_unfreeze_lets_training_be_that_of_a_network_that_was_never_frozen(name: str) -> None:
    model, untouched = build(name), build(name)
    freeze(model, "0")
    train(model, name, seed=1)
    with torch.no_grad():
        for own, other in zip(untouched[2].parameters(), model[2].parameters(), strict=True):
            own.copy_(other)
    if name == "codebook, registered late":  # which only its first forward makes
        assert tensors(model).keys() == tensors(untouched).keys()
    unfreeze(model)
    for layer, other in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(layer).keys() == vars(other).keys()
        assert not any(
            hook in PIN_HOOKS for hook in (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
        )
    before = tensors(model[0])
    train(model, name, seed=2)
    train(untouched, name, seed=2)
    after, expected = tensors(model), tensors(untouched)
    assert [key for key in expected if not identical(after[key], expected[key])] == []
    assert any(not identical(before[key], after[f"0.{key}"]) for key in before)


@pytest.mark.parametrize("name", ["Embedding, max_norm", "Embedding, max_norm and padding", "EmbeddingBag, max_norm"])
def test_freeze_keeps_what_max_norm_of_an_embedding_gives(name: str) -> None:
    model, reference, inputs = build(name), build(name), indices()
    freeze(model, "0")
    assert identical(model[0](inputs), reference[0](inputs))


def test_freeze_takes_an_embedding_with_max_norm_that_is_tied_to_a_projection() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.between = embedding(nn.Embedding(10, 4, max_norm=1.0)), nn.Linear(4, 4)
            self.scores = nn.Linear(4, 10, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scores(self.between(self.words(x)))

    model = Tied()
    before = model.words.weight.clone()
    freeze(model, "words")
    model.train()(indices()).sum().backward()
    assert identical(before, model.words.weight)
    assert model.between.weight.grad is not None


class Around(nn.Module):
    """Writes to the buffers of a layer inside in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.book, self.out = nn.Conv2d(3, 3, 1), Codebook("never"), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        if self.training:
            self.book.codes.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.out(self.book(x).mean((2, 3)))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [Around, lambda: NetWith("in training"), lambda: NetWith("always")])
@pytest.mark.parametrize("patterns", [("front", "book"), ("book",), ("re:front|book",), ("type:Codebook",)])
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, saved_and_loaded], ids=["", "copy", "file"])
def test_freeze_by_path_takes_layers_with_buffers_alone(
    make: Callable[[], nn.Module], patterns: tuple[str, ...], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = make()
    freeze(model, *patterns)
    model = copied(model).train()
    before = model.book.codes.clone()
    model(image()).sum().backward()
    assert identical(before, model.book.codes)
    assert audit(model) == []
    unfreeze(model, "book")
    model.train()(image())
    assert not identical(before, model.book.codes)


class NetWith(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.front, self.book, self.out = nn.Conv2d(3, 3, 1), Codebook(how), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.book(self.front(x)).mean((2, 3)))


def test_freeze_until_holds_layers_with_buffers_alone_and_unfreeze_since_lets_go() -> None:
    model = NetWith("in training")
    freeze(model, until="book", inputs=image())
    before = model.book.codes.clone()
    model.train()(image())
    assert identical(before, model.book.codes)
    unfreeze(model, since="book", inputs=image())
    model.train()(image())
    assert not identical(before, model.book.codes)


def test_unfreeze_of_the_head_leaves_what_was_frozen_as_a_whole() -> None:
    model = NetWith("in training")
    freeze(model)
    unfreeze(model, "out")
    before = model.book.codes.clone()
    model.train()(image())
    assert identical(before, model.book.codes)


def test_freeze_leaves_values_that_are_loaded_into_a_frozen_layer() -> None:
    model, other = NetWith("always"), NetWith("always")
    freeze(model, "front", "book")
    model.train()(image())
    model.load_state_dict(other.state_dict())
    model(image())
    assert identical(model.book.codes, other.book.codes)
    assert identical(model.front.weight, other.front.weight)


def test_freeze_puts_state_back_after_a_forward_that_fails() -> None:
    model = NetWith("always")
    freeze(model, "front", "book")
    before = model.book.codes.clone()
    with pytest.raises(RuntimeError):
        model.train()(torch.randn(2, 3, 4, 4).double())
    model.out = nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        model(image())
    assert identical(before, model.book.codes)


# ---- tools that average, reset, convert


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


# ---- TorchScript


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


# ---- networks whose `train` is their own


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.seen: list[object] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x)


class MoreArguments(Own):
    def train(self, mode: bool = True, *, option: int = 0) -> str:
        self.seen.append((mode, option))
        super().train(mode)
        return "trained"


class ReturnsNothing(Own):
    def train(self, mode: bool = True) -> None:
        super().train(mode)


class AlwaysTrains(Own):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


class TakesNothing(Own):
    def train(self) -> nn.Module:
        return super().train(True)


class EvalDoesNothing(Own):
    def eval(self) -> None:
        return None


@pytest.mark.parametrize("kind", [MoreArguments, ReturnsNothing, AlwaysTrains, TakesNothing, EvalDoesNothing])
def test_freeze_pins_hold_where_train_is_overridden(kind: type[Own]) -> None:
    layer = kind()
    freeze(layer)
    before = layer.bn.running_mean.clone()
    layer.train()
    layer(image())
    assert identical(before, layer.bn.running_mean)
    unfreeze(layer)
    layer.train()
    layer(image())
    assert not identical(before, layer.bn.running_mean)


def test_freeze_pins_pass_arguments_and_results_of_train_on() -> None:
    model = nn.Sequential(MoreArguments(), nn.Conv2d(3, 2, 1))
    freeze(model, "0")
    assert model[0].train(True, option=5) == "trained"
    assert model[0].train(mode=True, option=6) == "trained"
    assert model[0].seen == [(False, 5), (False, 6)]


def test_freeze_calls_a_train_that_was_put_on_one_layer_and_unfreeze_gives_it_back() -> None:
    model, seen = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), []

    def own(mode: bool = True, **options: int) -> nn.Module:
        seen.append((mode, options))
        return nn.Module.train(model[0], mode)

    model[0].train = own
    freeze(model, "0")
    model[0].train(True, steps=1)
    assert (seen, model[0].training) == ([(False, {"steps": 1})], False)
    unfreeze(model)
    assert model[0].train is own


# ---- one layer in several places


@pytest.mark.parametrize("shared", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(8, affine=False), nn.RReLU])
def test_freeze_pins_a_layer_that_stands_in_a_frozen_and_a_trainable_part(shared: Callable[[], nn.Module]) -> None:
    layer = shared()
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8), nn.Linear(8, 8), layer, nn.Linear(8, 2))
    report = freeze(model, "0", "2")
    inputs, before = vector(), tensors(layer)
    model.train()(inputs)
    assert report.pinned == ("1",)
    assert identical(model[:3](inputs), model[:3](inputs))
    assert [key for key, value in tensors(layer).items() if not identical(before[key], value)] == []


def test_freeze_says_which_outputs_depend_on_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    report = freeze(model, "0", "1")
    assert report.follow_batch == ("1",)
    assert str(report).endswith("outputs still depend on the batch in: 1")
    assert "its output follows its batch" in str(regraft.summary(model))
    assert freeze(nn.BatchNorm2d(3)).follow_batch == ()
    assert freeze(nn.InstanceNorm2d(3, affine=True)).follow_batch == ()
