"""Frozen means bit-identical on every family: a small member of each is half frozen, split, trained, and compared.

The table that this run makes is `docs/families.md`; `make families` writes it anew.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from oracles import identical
from regraft.anatomy.depths import parameter_depths
from regraft.anatomy.modes import evaluation_mode
from regraft.errors import RegraftError
from regraft.freezing import freeze
from regraft.freezing.pins import frozen_layers
from regraft.frontier import partition
from regraft.zoo import build, preprocessing_of

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs/families.md"
SMALL_SIDES = (64, 112)  # pixels; patches are of 14, 16 or 32
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
    mobilenet_v3_small regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11 vit_b_32
"""
TIMM = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
    cs3darknet_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla34 dpn68
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    gemma4_vit_167m ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_a hgnetv2_b0 hiera_tiny_224
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    legacy_seresnet18 legacy_xception levit_128 lowformer_b0 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformer_s12
    pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_004_tv repghostnet_050 repvit_m1 res2next50 resnest14d
    resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    test_byobnet test_convnext test_efficientnet test_mambaout test_maxvit test_nfnet test_resnet test_vit
    test_vit_relpos tf_mobilenetv3_large_minimal_100 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
    twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
    xcit_nano_12_p8_224
"""
NAMES = [*TORCHVISION.split(), *(f"timm/{name}" for name in TIMM.split())]
IS_COMPLETE = "REGRAFT_WRITE_FAMILIES" in os.environ
SOME_NAMES = NAMES if IS_COMPLETE else NAMES[::3]  # for sweeps that take several edits of each
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS = {**TRANSFORMER, "image_size": 64, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 2, 1]}
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 1, 2], "key_dim": [8, 8, 8], "depths": [2, 2, 2]}
CVT = {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}
MOBILEVIT = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32], "image_size": 64}
HUGGING_FACE: dict[
    str, tuple[str, dict[str, Any]]
] = {  # networks of a few thousand parameters, made without a download
    "vit": ("ViTForImageClassification", TOKENS),
    "deit": ("DeiTForImageClassification", TOKENS),
    "beit": ("BeitForImageClassification", TOKENS),
    "dinov2": ("Dinov2ForImageClassification", TOKENS),
    "clip": ("CLIPForImageClassification", {"vision_config": TOKENS}),
    "siglip": ("SiglipForImageClassification", {"vision_config": TOKENS}),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 64},
    ),
    "convnext": ("ConvNextForImageClassification", STAGES),
    "resnet": ("ResNetForImageClassification", {**STAGES, "embedding_size": 8, "layer_type": "basic"}),
    "regnet": ("RegNetForImageClassification", {**STAGES, "embedding_size": 8, "groups_width": 8}),
    "poolformer": ("PoolFormerForImageClassification", STAGES),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}),
    "levit": ("LevitForImageClassification", {**LEVIT, "image_size": 64}),
    "cvt": ("CvtForImageClassification", CVT),
    "mobilevit": ("MobileViTForImageClassification", MOBILEVIT),
}
ALL_NAMES = [*NAMES, *(f"transformers/{name}" for name in HUGGING_FACE)]


@dataclass(frozen=True)
class Row:
    """What happened to one network."""

    name: str
    family: str
    parameters: int = 0
    until: str = ""
    share: float = 0.0
    problem: str = ""
    split: str = ""

    def cells(self) -> str:
        figures = (f"{self.parameters:,}", f"`{self.until}`", f"{self.share:.0%}") if self.until else ("", "", "")
        return " | ".join((self.family, f"`{self.name}`", *figures, self.problem or "bit-identical", self.split))


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    found: dict[str, Row] = {}
    yield found
    if IS_COMPLETE and len(found) == len(ALL_NAMES):
        write_table(list(found.values()))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_what_is_frozen_stays_bit_identical(name: str, rows: dict[str, Row]) -> None:
    known = (
        {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if "`" in line} if TABLE.exists() else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constructors
        rows[name] = row = freeze_half_and_train(name)
    if not IS_COMPLETE:
        assert name in known, f"docs/families.md lacks {name}: run `make families`"
        assert row.problem == "" or row.problem.partition(":")[0] in known[name]
        assert row.split in known[name]


def test_every_family_of_both_libraries_is_in_the_list() -> None:
    theirs = {family(f"timm/{name}") for name in timm.list_models()}
    theirs |= {family(name) for name in torchvision.models.list_models(module=torchvision.models)}
    assert {family(name) for name in NAMES} == theirs


def freeze_half_and_train(name: str) -> Row:
    try:
        model = build_any(name)
        inputs = images(model)
        until = middle(model)
        report = freeze(model, until=until)
        split = split_in_two(model, inputs)
    except (RegraftError, RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        return Row(name, family(name), problem=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}")
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    layers = {path for path, _ in frozen_layers(model)}
    before = {key: tensor.detach().clone() for key, tensor in tensors(model).items()}
    train(model, inputs)
    after = tensors(model)
    held = [key for key in after if key in frozen or key.rpartition(".")[0] in layers]
    assert frozen
    assert [key for key in held if not identical(before[key], after[key])] == []
    trained = {key: p for key, p in model.named_parameters() if p.grad is not None and p.detach().abs().sum() > 0}
    assert trained
    assert [key for key in trained if identical(before[key], after[key])] == []
    return Row(name, family(name), report.total, until, report.frozen / report.total, split=split)


def split_in_two(model: nn.Module, inputs: torch.Tensor) -> str:
    """Return where the frontier lies; both parts must give what the whole gives, and no image may need another."""
    try:
        parts = partition(model, inputs)
    except RegraftError as error:
        return f"{type(error).__name__}: {str(error)[:300]}".replace("|", "/").replace("\n", " ")
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(parts.suffix):
        kept = parts.prefix(inputs)
        ours, whole = (
            [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            for output in (parts.suffix(*kept), model(inputs))
        )
        turned = parts.prefix(inputs.flip(0))
    assert all(identical(a, b) for a, b in zip(ours, whole, strict=True))
    assert all(torch.allclose(a, b.flip(0), atol=1e-3) for a, b in zip(kept, turned, strict=True))
    constant, live = parts.multiply_adds
    places = ", ".join(f"`{cut.layer or cut.name}`" for cut in parts.frontier)
    how = " recorded" if "recorded" in (parts.note or "") else ""
    return (
        f"{constant / (constant + live):.0%} constant, before {places}{how}"
        if how
        else (f"{constant / (constant + live):.0%} constant, after {places}")
    )


def build_any(name: str) -> nn.Module:
    library, _, kind = name.partition("/")
    if library != "transformers":
        return build(name)
    import transformers

    class_name, options = HUGGING_FACE[kind]
    network = getattr(transformers, class_name)
    return network(network.config_class(num_labels=5, **options))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, those that no state dict has included."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def images(model: nn.Module) -> torch.Tensor:
    """Return a batch of the smallest images that fit."""
    for side in (*SMALL_SIDES, preprocessing_of(model).size):
        batch = torch.randn(2, 3, side, side)
        try:
            with torch.no_grad():
                model.train()(batch)  # which runs auxiliary heads as well
        except (RuntimeError, AssertionError, ValueError):
            continue
        return batch
    raise ValueError("its forward takes no batch of images")


def middle(model: nn.Module) -> str:
    """Return the layer in which the first half of the blocks ends."""
    depths = parameter_depths(model)
    order = sorted(set(depths.values()))
    half = order[(len(order) - 1) // 2]
    last = [name for name, _ in model.named_parameters() if depths.get(name) == half][-1]
    return last.rpartition(".")[0]


def train(model: nn.Module, inputs: torch.Tensor) -> None:
    """Take three steps that would move whatever may move: momentum, decay of everything, training mode."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        outputs = [x for x in tree_leaves(model.train()(inputs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        optimizer.zero_grad()
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
        optimizer.step()


def family(name: str) -> str:
    if name.startswith("timm/"):
        return "timm " + timm.model_entrypoint(name.removeprefix("timm/")).__module__.rpartition(".")[2]
    if name.startswith("transformers/"):
        return name.replace("/", " ")
    return "torchvision " + torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def write_table(rows: list[Row]) -> None:
    kinds = {
        kind: [row for row in rows if row.family.startswith(kind)] for kind in ("torchvision", "timm", "transformers")
    }
    totals = [f"{sum(not row.problem for row in kind)} of {len(kind)} of {name}" for name, kind in kinds.items()]
    import transformers

    versions = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}"
    lines = [
        "# Families",
        "",
        "One small member of every classification family, with random weights: frozen up to the layer in the middle,",
        "three steps of SGD with momentum and weight decay in training mode, then every frozen tensor, buffers",
        "included, is compared bit by bit, and every trained one must have moved. Before that, `partition` splits it:",
        "the two parts must give what the whole gives, bit for bit, and no image of a batch may need another in the",
        "constant part. The last column says how much of the multiply-adds that part has, and where it ends. The",
        "networks of transformers have a few thousand parameters and are made from their configuration.",
        "`make families` writes this page.",
        "",
        f"{', '.join(totals[:-1])} and {totals[-1]} families pass",
        f"({versions}, timm {timm.__version__}, transformers {transformers.__version__}).",
        "",
        "| family | member | parameters | frozen until | frozen | outcome | partition |",
        "|---|---|---:|---|---:|---|---|",
        *(f"| {row.cells()} |" for row in sorted(rows, key=lambda row: row.family)),
    ]
    TABLE.write_text("\n".join(lines) + "\n")
