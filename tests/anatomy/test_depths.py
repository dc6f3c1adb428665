import re
from collections import defaultdict

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision import models

import tiny
from regraft import param_groups
from regraft.anatomy.model_facts import ModelFacts

ENCODER = "encoder.layers.encoder_layer_"


class Around(nn.Module):
    """A network inside of another module, alone or under a head of its own."""

    def __init__(self, backbone: nn.Module, features: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.classify = nn.Linear(features, 3) if features else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.backbone(x))


WRAPPERS = {
    "own class": Around,
    "two levels": lambda network: Around(Around(network)),
    "DataParallel": nn.DataParallel,
    "Sequential": lambda network: nn.Sequential(nn.Identity(), network),
    "compiled": torch.compile,
}
BLOCKS = {  # written down from the published architectures
    "resnet18": [["conv1", "bn1"], *([f"layer{i}.{j}"] for i in (1, 2, 3, 4) for j in (0, 1)), ["fc"]],
    "vit_b_16": [
        ["class_token", "conv_proj", "encoder.pos_embedding"],
        *([f"{ENCODER}{i}"] for i in range(11)),
        [f"{ENCODER}11", "encoder.ln"],
        ["heads"],
    ],
    "swin_t": [
        ["features.0"],
        *([f"features.1.{i}"] for i in range(2)),
        ["features.2"],
        *([f"features.3.{i}"] for i in range(2)),
        ["features.4"],
        *([f"features.5.{i}"] for i in range(6)),
        ["features.6"],
        ["features.7.0"],
        ["features.7.1", "norm"],
        ["head"],
    ],
    "mobilenet_v3_small": [*([f"features.{i}"] for i in range(13)), ["classifier.0"], ["classifier.3"]],
}
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_16",
]
HEADS = {"alexnet": "classifier.6", "googlenet": "fc", "squeezenet1_1": "classifier.1", "vit_b_16": "heads.head"}


def weightless(name: str) -> nn.Module:
    options = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("regnet"):  # computes its widths with tensors
        return models.get_model(name).eval().to("meta")
    with torch.device("meta"):
        return models.get_model(name, **options).eval()


@pytest.mark.parametrize("decay", [0.65, 1.0])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_param_groups_has_the_rates_of_timm_for_networks_of_timm(name: str, decay: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    theirs = param_groups_layer_decay(model, layer_decay=decay)
    expected = {id(p): 0.01 * group["lr_scale"] for group in theirs for p in group["params"]}
    ours = param_groups(model, 0.01, layer_decay=decay)
    assert {id(p): group["lr"] for group in ours for p in group["params"]} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "mixer_s16_224", "poolformer_s12"])
def test_model_facts_depths_by_structure_alone_are_those_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    of_timm = ModelFacts(model).depths
    model.__class__ = type("Own", (type(model),), {"group_matcher": None})
    assert ModelFacts(model).depths == of_timm


@pytest.mark.parametrize("name", BLOCKS)
def test_model_facts_depths_grow_by_one_with_each_block(name: str) -> None:
    found = defaultdict(set)
    model = weightless(name)
    for parameter, depth in ModelFacts(model).depths.items():
        found[depth].add(parameter)
    names = [parameter for parameter, _ in model.named_parameters()]
    expected = {
        depth: {name for name in names for path in block if name == path or name.startswith(f"{path}.")}
        for depth, block in enumerate(BLOCKS[name])
    }
    assert dict(found) == expected


def executed_layers(model: nn.Module, side: int) -> list[str]:
    """List the layers with parameters in the order in which hooks see them begin."""
    order: list[str] = []
    for path, layer in model.named_modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_pre_hook(lambda *_, path=path: order.append(path))
    model(torch.empty(1, 3, side, side, device="meta"))
    return list(dict.fromkeys(order))


@pytest.mark.parametrize("name", FAMILIES)
def test_model_facts_depths_never_fall_along_the_forward_and_the_head_alone_is_deepest(name: str) -> None:
    model = weightless(name)
    depths = ModelFacts(model).depths
    order = executed_layers(model, 299 if name == "inception_v3" else 224)
    path_of = {
        f"{path}.{parameter}" if path else parameter: path
        for path, layer in model.named_modules()
        for parameter, _ in layer.named_parameters(recurse=False)
    }
    deepest_of = {
        path: max(depths[name] for name, owner in path_of.items() if owner == path)
        for path in order
        if next(model.get_submodule(path).children(), None) is None  # a block with a token of its own begins earlier
    }
    assert list(deepest_of.values()) == sorted(deepest_of.values())
    assert min(depths.values()) == 0
    assert set(range(max(depths.values()) + 1)) == set(depths.values())
    head = HEADS.get(name, order[-1])
    at_the_end = {path_of[name] for name, depth in depths.items() if depth == max(depths.values())}
    assert at_the_end & set(order) == {head}  # beside it only what the forward does not use: auxiliary heads
    assert depths.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", ["plain", "residual", "tied", "root-token", "functional-dropout", "sequential"])
def test_model_facts_depths_of_the_head_alone_are_deepest(name: str) -> None:
    depths = ModelFacts(tiny.build(name)).depths
    deepest = {parameter for parameter, depth in depths.items() if depth == max(depths.values())}
    head = {"plain": "fc", "sequential": "7"}.get(name, "head")
    assert deepest == {f"{head}.weight", f"{head}.bias"}


def test_model_facts_depths_of_a_token_of_the_root_are_those_of_where_it_is_used() -> None:
    depths = ModelFacts(tiny.build("root-token")).depths
    assert depths["cls_token"] == depths["positions"] == depths["patches.weight"] == 0
    assert depths["block.norm1.weight"] == 1


def test_model_facts_depths_of_what_is_never_used_are_those_of_the_head() -> None:
    model = tiny.build("plain")
    model.spare = nn.Linear(2, 2)
    depths = ModelFacts(model).depths
    assert depths["spare.weight"] == depths["fc.weight"] == max(depths.values())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_param_groups_has_the_rates_of_timm_for_its_networks_inside_of_a_module(name: str, wrapper: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    theirs = param_groups_layer_decay(network, layer_decay=0.65)
    expected = {id(p): 0.01 * group["lr_scale"] for group in theirs for p in group["params"]}
    ours = param_groups(WRAPPERS[wrapper](network), 0.01, layer_decay=0.65)
    assert {id(p): group["lr"] for group in ours for p in group["params"]} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("wrapper", ["own class", "two levels", "DataParallel"])
@pytest.mark.parametrize("name", ["vit_b_16", "resnet18", "mobilenet_v3_small"])
def test_model_facts_depths_of_torchvisions_networks_stay_the_same_inside_of_a_module(name: str, wrapper: str) -> None:
    model = weightless(name)
    prefix = {"own class": "backbone.", "two levels": "backbone.backbone.", "DataParallel": "module."}[wrapper]
    inside = ModelFacts(WRAPPERS[wrapper](model)).depths
    assert inside == {prefix + parameter: depth for parameter, depth in ModelFacts(model).depths.items()}


def test_model_facts_depths_of_a_head_on_a_headless_network_of_timm_are_one_deeper() -> None:
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
    depths = ModelFacts(Around(network, 192)).depths
    assert depths["backbone.cls_token"] == depths["backbone.patch_embed.proj.weight"] == 0
    assert [depths[f"backbone.blocks.{i}.norm1.weight"] for i in range(3)] == [1, 2, 3]
    deepest = max(depths.values())
    assert {name for name, depth in depths.items() if depth == deepest} >= {"classify.weight", "classify.bias"}
    assert depths["backbone.blocks.2.norm1.weight"] < deepest


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
HUGGING_FACE = {  # the class, its configuration, and its blocks as they are written down there
    "BERT": (
        "BertForSequenceClassification",
        ("BertConfig", HIDDEN | {"vocab_size": 50}),
        [["bert.embeddings"], *([f"bert.encoder.layer.{i}"] for i in range(3)), ["bert.pooler"], ["classifier"]],
    ),
    "ViT": (
        "ViTForImageClassification",
        ("ViTConfig", HIDDEN | {"image_size": 32, "patch_size": 8}),
        None,
    ),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        ("DistilBertConfig", {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}),
        [
            ["distilbert.embeddings"],
            *([f"distilbert.transformer.layer.{i}"] for i in range(3)),
            ["pre_classifier"],
            ["classifier"],
        ],
    ),
}
RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 2], "layer_type": "basic"}
OTHER_HEADS = {  # networks without a classifier, as above; of a tied head, the embeddings keep the lowest rate
    "GPT-2": (
        "GPT2LMHeadModel",
        (
            "GPT2Config",
            {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0},
        ),
        [["transformer.wte", "transformer.wpe"], ["transformer.h.0"], ["transformer.h.1", "transformer.ln_f"]],
    ),
    "T5": (
        "T5ForConditionalGeneration",
        ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}),
        [
            ["shared"],
            ["encoder.block.0"],
            ["encoder.block.1", "encoder.final_layer_norm"],
            ["decoder.block.0"],
            ["decoder.block.1", "decoder.final_layer_norm"],
        ],
    ),
    "ResNet": (
        "ResNetForImageClassification",
        ("ResNetConfig", RESIDUAL),
        [
            ["resnet.embedder"],
            ["resnet.encoder.stages.0.layers.0"],
            ["resnet.encoder.stages.1.layers.0"],
            ["resnet.encoder.stages.1.layers.1"],
            ["classifier"],
        ],
    ),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_model_facts_depths_tell_blocks_of_hugging_face_networks_apart(name: str, inside: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, (config, options), blocks = HUGGING_FACE[name]
    network = getattr(transformers, kind)(getattr(transformers, config)(**options))
    prefix = "backbone." if inside else ""
    depths = ModelFacts(Around(network) if inside else network).depths
    found = defaultdict(set)
    for parameter, depth in depths.items():
        found[depth].add(parameter.removeprefix(prefix))
    per_layer = [
        depth
        for i in range(3)
        for depth, names in found.items()
        if any(re.search(rf"layers?\.{i}\.", n) for n in names)
    ]
    assert per_layer == sorted(set(per_layer))
    assert len(per_layer) == 3
    assert found[max(found)] == {"classifier.weight", "classifier.bias"}
    if blocks is not None:
        names = [parameter for parameter, _ in network.named_parameters()]
        assert dict(found) == {
            depth: {name for name in names if any(name.startswith(f"{path}.") for path in block)}
            for depth, block in enumerate(blocks)
        }


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_model_facts_depths_of_hugging_face_networks_are_their_blocks(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, (config, options), blocks = OTHER_HEADS[name]
    network = getattr(transformers, kind)(getattr(transformers, config)(**options))
    expected = {
        parameter: depth
        for parameter, _ in network.named_parameters()
        for depth, block in enumerate(blocks)
        if any(parameter.startswith(f"{path}.") for path in block)
    }
    assert ModelFacts(network).depths == expected


class OfABatch(nn.Module):
    """Takes what nothing can guess, and keeps its blocks deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(tiny.build("residual") for _ in range(3))})
        self.scale = nn.Parameter(torch.ones(1))
        self.classify = nn.Linear(4, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise KeyError(batch["pixels"])


def test_param_groups_counts_blocks_by_registration_where_the_forward_cannot_run() -> None:
    model = OfABatch()
    rates = {id(p): group["lr"] for group in param_groups(model, 1.0, layer_decay=0.5) for p in group["params"]}
    blocks = [{rates[id(p)] for p in block.parameters()} for block in model.body["blocks"]]
    assert rates[id(model.stem.weight)] == 0.5**4
    assert blocks == [{0.5**3}, {0.5**2}, {0.5}]
    assert rates[id(model.classify.weight)] == 1
