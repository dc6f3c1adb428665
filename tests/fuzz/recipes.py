"""Recipes that are not carried out: of too many or too large layers, nested, of code, or of no sense at all."""

import copy
from random import Random
from typing import Any

HUGE = (1001, 10**5, 10**6, 6 * 10**7, 2**63 - 1, 2**63, 10**30)
NAMES = (
    "../outside",
    "/outside",
    "http://127.0.0.1:9/model",
    "file:///outside",
    "timm/hf_hub:nobody/model",
    "timm/hf-hub:nobody/model",
    "timm/local-dir:/outside",
    "timm/../resnet18",
    "timm/resnet18.../../outside",
    "py:marker:call",
    "py:marker:x",
    "py:marker.py:Thing",
    "timm/vit_giant_patch14_dinov2",
    "regnet_y_128gf",
    "vgg19",
    "resnet18",
    "hf/nobody",
    "",
    "torch.nn",
    "stitch",
    "graft",
)


def hostile_recipe(random: Random, known: dict[str, Any]) -> Any:
    """Return a recipe as JSON data; `known` is one that makes sense."""
    recipe = copy.deepcopy(known)
    change = random.choice(
        ["layers", "layers", "layers", "name", "arguments", "steps", "steps", "many", "parts", "nonsense"]
    )
    if change == "layers":
        recipe["source"] = {"name": "torch.nn", "layers": _layers(random)}
    elif change == "name":
        recipe["source"] = {
            "name": random.choice(NAMES),
            "weights": random.choice(["none", "../x", "default", "http://x"]),
        }
    elif change == "arguments":
        recipe["source"] = _with_arguments(random)
    elif change == "steps":
        recipe["steps"] = [*recipe["steps"], *(_step(random) for _ in range(random.choice([1, 1, 3])))]
    elif change == "many":
        step = {"operation": "append", "arguments": {"layers": ["ReLU()"]}}
        recipe["steps"] = [step] * random.choice([65, 150])
    elif change == "parts":
        recipe = _nested(random, recipe)
    else:
        recipe = random.choice(
            [[], "x", {"source": []}, {"source": {"name": 5}}, {"steps": []}, {**recipe, "steps": {}}]
        )
    return recipe


def _with_arguments(random: Random) -> dict[str, Any]:
    big: Any = random.choice([*HUGE, -1, True, 1.5, None, "x", [], [10**5, 10**5], {}, "../outside"])
    name = random.choice(
        ["timm/test_vit", "timm/swin_tiny_patch4_window7_224", "resnet18", "vit_b_32", "py:marker:call", "torch.nn"]
    )
    known = ("num_classes", "img_size", "image_size", "in_chans", "global_pool", "checkpoint_path", "weights", "config")
    names = [random.choice(known) for _ in range(random.choice([1, 1, 3]))]
    if random.random() < 0.1:
        return {"name": "transformers/Trainer", "arguments": {"config": {"auto_map": {"x": "marker.call"}}}}
    return {"name": name, "arguments": dict.fromkeys(names, big)}


def _layers(random: Random) -> Any:
    big = random.choice(HUGE)
    depth, count = random.choice([10, 49, 60]), random.choice([300, 1000])
    repeated = "TransformerEncoderLayer(4, 1, 4)"
    for _ in range(random.choice([1, 2])):
        repeated = f"TransformerEncoder({repeated}, {random.choice([30, 150, 1001])})"
    texts = [
        f"Linear({big}, {random.choice([1, 1000, big])})",
        "Sequential(Linear(8000, 8000), Linear(8000, 8000))",
        f"Embedding({big}, 16)",
        f"Conv2d(3, 3, {random.choice([1001, 4001])})",
        "Sequential(" * depth + "ReLU()" + ")" * depth,
        f"Sequential({', '.join(['ReLU()'] * count)})",
        f"Sequential({', '.join(['Linear(1, 1)'] * count)})",
        repeated,
        f"Transformer(4, 1, {random.choice([1000, big])}, {random.choice([1000, big])}, 4)",
        f"LSTM(1, 1, num_layers={random.choice([1000, big])})",
        f"timm.layers.BlurPool2d(3, filt_size={random.choice([101, 8001])})",
        f"timm.layers.CondConv2d(4, 4, 1, num_experts={big})",
        f"timm.layers.RelPosBias(({random.choice([30, 90])}, 90), 4)",
        f"timm.layers.RotaryEmbedding(64, feat_shape=({random.choice([100, 1000])}, 1000))",
        f"AdaptiveLogSoftmaxWithLoss(4, {big}, [{', '.join(map(str, range(1, count)))}])",
        f"Upsample(size={big})",
        f"ParameterList({big})",
        "py('marker:call')",
        "py('marker.py:Thing')",
        "marker.Thing('x').method('y')",
        "timm.layers.nothing()",
        "Module()",
        "Linear(4, 3, device='cuda')",
        "Linear('4', [3])",
        "Linear" + "(" * 60,
        f"Linear({'9' * 4301}, 1)",
        "Linear(4, 4) ** 2",
        "a" * 100_001,
        f"Dropout({'-' * 60}1)",
        5,
        ["Linear(1, 1)"],
        "",
    ]
    return random.choice(texts)


def _step(random: Random) -> dict[str, Any]:
    big: Any = random.choice([*HUGE, 0, -1, True, 1.5, None, "x", [], {}])
    path = random.choice(
        ["0", "", "re:.*", "re:(", "type:Linear", "*", "children[:9999999999]", "..", "x" * 1001, 5, None]
    )
    layer: Any = random.choice(
        ["ReLU()", f"Linear(4, {big})", "py('marker:call')", "Linear(9, 9)", 5, ["ReLU()"], "ReLU(), ReLU()"]
    )
    arguments: dict[str, dict[str, Any]] = {
        "append": {"layers": random.choice([[layer], layer, [layer] * 300, [[layer]]])},
        "insert": {"new": layer, "after": path},
        "remove": {"path": path},
        "replace": {"path": path, "new": layer},
        "replace_head": {"new": big},
        "replace_stem": {"channels": big},
        "truncate": {"drop": big},
        "unknown": {},
    }
    operation = random.choice(list(arguments))
    extra = random.choice(
        [{}, {}, {}, {"inputs": [big, 3, big, big]}, {"trust_code": True}, {"keep": {"0": big}}, {"model": 1}]
    )
    return {"operation": operation, "arguments": {**arguments[operation], **extra}}


def _nested(random: Random, recipe: dict[str, Any]) -> dict[str, Any]:
    """Put networks into networks, by stitches and grafts."""
    small = {"source": {"name": "torch.nn", "layers": "Sequential(Linear(4, 4), ReLU(), Linear(4, 4))"}}
    arguments: Any = random.choice(
        [
            {},
            {"cut": ["1", "1"], "adapter": "auto", "given": [1, 4], "wanted": [1, 4], "is_fitted": False},
            {"cut": ["1", "1"], "adapter": "auto", "given": [1, 10**6], "wanted": [1, 10**9], "is_fitted": True},
            {"cut": ["1", "1"], "adapter": "auto", "given": "x", "wanted": [1, [4]], "is_fitted": 5},
            {"cut": "1", "adapter": "py('marker:call')", "given": [], "wanted": []},
            {"heads": {"": "Linear(4, 3)"}, "parts": ["a", "b"], "has_names": False},
            {"heads": {"a.b": "Linear(4, 3)"}, "parts": ["..", "x.y"], "has_names": True},
            {"heads": [], "parts": 5},
        ]
    )
    name = random.choice(["stitch", "graft", "stitch", "graft", "other"])
    depth, width = random.choice([(1, 2), (1, 1), (2, 2), (4, 2), (12, 2), (60, 1), (1, 500)])
    inner = random.choice([small, recipe])
    for _ in range(depth):
        inner = {
            "source": {"name": name, "parts": [inner] * (width if depth < 5 else 1) + [small], "arguments": arguments}
        }
    return inner
