"""The networks of every family that the sweeps go through, and images for them."""

import os
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from regraft.anatomy.model_facts import ModelFacts
from regraft.zoo import build, preprocessing_of

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

SOME_NAMES = NAMES if IS_COMPLETE else NAMES[::5]  # `make families` goes through all

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
SOME_OF_ALL = ALL_NAMES if IS_COMPLETE else [*SOME_NAMES, *ALL_NAMES[len(NAMES) :]]


def build_any(name: str) -> nn.Module:
    library, _, kind = name.partition("/")
    if library != "transformers":
        return build(name)
    import transformers

    class_name, options = HUGGING_FACE[kind]
    network = getattr(transformers, class_name)
    return network(network.config_class(num_labels=5, **options))


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
    depths = ModelFacts(model).depths
    order = sorted(set(depths.values()))
    half = order[(len(order) - 1) // 2]
    last = [name for name, _ in model.named_parameters() if depths.get(name) == half][-1]
    return last.rpartition(".")[0]


def family(name: str) -> str:
    if name.startswith("timm/"):
        return "timm " + timm.model_entrypoint(name.removeprefix("timm/")).__module__.rpartition(".")[2]
    if name.startswith("transformers/"):
        return name.replace("/", " ")
    return "torchvision " + torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
