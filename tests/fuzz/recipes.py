"""Recipes that nobody should carry out: endless, gigantic, nested, of code, or of no sense at all."""

import copy
from random import Random
from typing import Any

HUGE = (10**5, 10**6, 10**9, 2**31, 2**40, 2**63 - 1, 2**63, 10**30)
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "http://127.0.0.1:9/model",
    "file:///etc/passwd",
    "timm/hf_hub:evil/model",
    "timm/hf-hub:evil/model",
    "timm/local-dir:/etc",
    "timm/../resnet18",
    "timm/resnet18.../../evil",
    "py:os:system",
    "py:this:x",
    "py:evil.py:Net",
    "timm/vit_giant_patch14_dinov2",
    "regnet_y_128gf",
    "vgg19",
    "resnet18",
    "hf/evil",
    "",
    "torch.nn",
    "stitch",
    "graft",
)


def hostile_recipe(random: Random, known: dict[str, Any]) -> Any:
    """Return a recipe as JSON data; `known` is one that makes sense."""
    recipe = copy.deepcopy(known)
    change = random.choice(["layers", "layers", "layers", "name", "steps", "steps", "many", "parts", "nonsense"])
    if change == "layers":
        recipe["source"] = {"name": "torch.nn", "layers": _layers(random)}
    elif change == "name":
        recipe["source"] = {
            "name": random.choice(NAMES),
            "weights": random.choice(["none", "../x", "default", "http://x"]),
        }
    elif change == "steps":
        recipe["steps"] = [*recipe["steps"], *(_step(random) for _ in range(random.choice([1, 1, 3])))]
    elif change == "many":
        step = {"operation": "append", "arguments": {"layers": ["ReLU()"]}}
        recipe["steps"] = [step] * random.choice([150, 5000])
    elif change == "parts":
        recipe = _nested(random, recipe)
    else:
        recipe = random.choice(
            [[], "x", {"source": []}, {"source": {"name": 5}}, {"steps": []}, {**recipe, "steps": {}}]
        )
    return recipe


def _layers(random: Random) -> Any:
    big = random.choice(HUGE)
    depth, count = random.choice([10, 60, 5000]), random.choice([300, 1000, 6000])
    repeated = "TransformerEncoderLayer(4, 1, 4)"
    for _ in range(random.choice([1, 2, 4])):
        repeated = f"TransformerEncoder({repeated}, {random.choice([30, 999, big])})"
    texts = [
        f"Linear({big}, {random.choice([1, 1000, big])})",
        "Sequential(Linear(30000, 30000), Linear(30000, 30000))",
        f"Embedding({big}, 16)",
        f"Conv2d(3, 3, {random.choice([1001, 100_001])})",
        "Sequential(" * depth + "ReLU()" + ")" * depth,
        f"Sequential({', '.join(['ReLU()'] * count)})",
        f"Sequential({', '.join(['Linear(1, 1)'] * count)})",
        repeated,
        f"Transformer(4, 1, {random.choice([1000, big])}, {random.choice([1000, big])}, 4)",
        f"LSTM(1, 1, num_layers={random.choice([1000, big])})",
        f"timm.layers.BlurPool2d(3, filt_size={random.choice([101, 100_001, big])})",
        f"timm.layers.CondConv2d(4, 4, 1, num_experts={big})",
        f"timm.layers.RelPosBias(({random.choice([200, 5000])}, 200), 4)",
        f"timm.layers.RotaryEmbedding({random.choice([64, 10**6])}, feat_shape=({random.choice([100, 10**5])}, 5000))",
        f"AdaptiveLogSoftmaxWithLoss(4, {big}, [{', '.join(map(str, range(1, count)))}])",
        f"Upsample(size={big})",
        f"ParameterList({big})",
        "py('os:system')",
        "py('evil.py:Net')",
        "__import__('os').system('x')",
        "timm.layers.__dict__()",
        "Module()",
        "Linear(4, 3, device='cuda')",
        "Linear('4', [3])",
        "Linear" + "(" * 300,
        f"Linear({'9' * 5000}, 1)",
        "Linear(4, 4) ** 2",
        "a" * 200_000,
        f"Dropout({'-' * 5000}1)",
        5,
        ["Linear(1, 1)"],
        "",
    ]
    return random.choice(texts)


def _step(random: Random) -> dict[str, Any]:
    big: Any = random.choice([*HUGE, 0, -1, True, 1.5, None, "x", [], {}])
    path = random.choice(
        ["0", "", "re:(a+)+$", "re:(", "type:Linear", "*", "children[:9999999999]", "..", "x" * 1000, 5, None]
    )
    layer: Any = random.choice(
        ["ReLU()", f"Linear(4, {big})", "py('os:system')", "Linear(9, 9)", 5, ["ReLU()"], "ReLU(), ReLU()"]
    )
    arguments: dict[str, dict[str, Any]] = {
        "append": {"layers": random.choice([[layer], layer, [layer] * 300, [[layer]]])},
        "insert": {"new": layer, "after": path},
        "remove": {"path": path},
        "replace": {"path": path, "new": layer},
        "replace_head": {"new": big},
        "replace_stem": {"channels": big},
        "truncate": {"drop": big},
        "system": {},
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
            {"cut": "1", "adapter": "py('os:system')", "given": [], "wanted": []},
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
