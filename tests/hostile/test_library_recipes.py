"""Recipes that name a network of a library by arguments or a configuration: data alone, and nothing is fetched."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from hostile.crafted import document, write_with
from regraft.card import Recipe, Source
from regraft.checkpoint.rebuilding import rebuild
from regraft.checkpoint.recipes.transformers_config import config_data
from regraft.errors import CheckpointError, InputError, ModelError

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 32}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def vit(**config: Any) -> Source:
    return Source(name="transformers/ViTForImageClassification", arguments={"config": {**TINY, **config}})


def timm(**arguments: Any) -> Source:
    return Source(name="timm/test_vit", arguments=arguments)


REFUSED: dict[str, tuple[Source, str]] = {
    "a file to read": (timm(checkpoint_path="/etc/passwd"), "with checkpoint_path='/etc/passwd', which it may not"),
    "a configuration of weights": (timm(pretrained_cfg={"url": "http://x"}), "with pretrained_cfg={'url': 'http://x'}"),
    "a nested value": (timm(img_size=[[1]]), r"with img_size=\(\[1\],\), which it may not"),
    "a class": (timm(norm_layer="BatchNorm2d"), "with norm_layer='BatchNorm2d', which it may not"),
    "a wrong value": (timm(img_size="x"), "'timm/test_vit' cannot be built with img_size='x': "),
    "too large": (timm(img_size=10**7), "a recipe asks for a tensor of [0-9,]+ elements"),
    "weights of torchvision": (Source(name="resnet18", arguments={"weights": "DEFAULT"}), "with weights='DEFAULT'"),
    "arguments of one's own class": (Source(name="py:x.py:X", arguments={"a": 1}), "Expected .* for no argument"),
    "no configuration": (Source(name="transformers/ViTModel"), "has no configuration"),
    "further arguments": (
        Source(name="transformers/ViTModel", arguments={"config": TINY, "from_tf": True}),
        "has no configuration",
    ),
    "no network": (Source(name="transformers/Trainer", arguments={"config": {}}), "has no network 'Trainer'"),
    "an automatic class": (
        Source(name="transformers/AutoModel", arguments={"config": {"auto_map": {}}}),
        "no network with a configuration",
    ),
    "a module": (Source(name="transformers/models.vit.modeling_vit.os", arguments={"config": {}}), "has no network"),
    "a private name": (Source(name="transformers/__dict__", arguments={"config": {}}), "has no network"),
    "attention from a hub": (
        vit(attn_implementation="kernels-community/x"),
        "by 'kernels-community/x', expected eager",
    ),
    "layers without end": (vit(num_hidden_layers=2**23), "more than 100,000 layers|200,000 operations"),
    "an endless table": (vit(image_size=2**20), "a recipe asks for a tensor of"),
    "a huge number": (vit(id2label={"0": "a"}, hidden_size=2**60), "holds the number 1152921504606846976"),
    "a wrong configuration": (vit(hidden_size="wide"), "cannot be configured"),
    "a kernel from a hub": (
        Source(name="transformers/RwkvModel", arguments={"config": {"hidden_size": 8}}),
        "networks of the family 'rwkv' may fetch parts of themselves",
    ),
    "a backbone from a hub": (
        Source(name="transformers/DetrModel", arguments={"config": {"backbone": "x", "use_timm_backbone": True}}),
        "networks of the family 'detr' may fetch parts",
    ),
    "a backbone within": (
        Source(
            name="transformers/LlavaForConditionalGeneration",
            arguments={"config": {"vision_config": {"model_type": "timm_wrapper", "architecture": "resnet18"}}},
        ),
        "networks of the family 'timm_wrapper' may fetch parts",
    ),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=list(REFUSED))
def test_rebuild_refuses_arguments_that_reach_beyond_a_network(source: Source, message: str) -> None:
    if source.name.startswith("transformers/"):
        pytest.importorskip("transformers")
    loaded = set(sys.modules)
    with pytest.raises(InputError, match=message):
        rebuild(Recipe.model_validate_json(Recipe(source=source).model_dump_json()))
    assert not any(
        name.startswith(("kernels", "tensorflow", "wandb", "deepspeed")) for name in set(sys.modules) - loaded
    )


def test_rebuild_leaves_out_what_would_run_other_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = tmp_path / "modeling_other.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Other: pass\n")
    config = {
        "auto_map": {"AutoModelForImageClassification": "modeling_other.Other", "AutoConfig": "modeling_other.Other"},
        "_name_or_path": str(tmp_path),
        "name_or_path": str(tmp_path),
        "trust_remote_code": True,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "custom_pipelines": {"x": {"impl": "modeling_other.Other"}},
        "_attn_implementation": "kernels-community/flash-attn",
        "_attn_implementation_internal": "kernels-community/flash-attn",
        "experts_implementation": "kernels-community/x",
        "num_labels": 10**9,
        "dtype": "load",
    }
    model = rebuild(Recipe(source=vit(**config)))
    kept = config_data(model.config)
    assert not set(config) & set(kept)
    assert kept["attn_implementation"] in ("eager", "sdpa")
    assert len(kept["id2label"]) == 2
    assert not (tmp_path / "ran").exists()


def test_load_takes_no_more_memory_for_a_configuration_than_its_file_has(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY))
    saved = regraft.save(model, tmp_path / "model.safetensors")
    recipe = json.loads(Recipe(source=vit(intermediate_size=2**23, hidden_size=64)).model_dump_json())
    write_with(saved, tmp_path / "other.safetensors", document(card={"recipe": recipe}))
    with pytest.raises(CheckpointError, match=r"does not match its own recipe at|elements, and [0-9,]+ are the most"):
        regraft.load(tmp_path / "other.safetensors")
    loaded = regraft.load(saved)
    assert torch.equal(loaded(torch.ones(1, 3, 32, 32)).logits, model.eval()(torch.ones(1, 3, 32, 32)).logits)


def test_config_data_refuses_what_json_does_not_hold() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**TINY)
    config.extra = object()
    with pytest.raises(ModelError, match=r"its configuration \(ViTConfig\) cannot be written as JSON: .*object"):
        config_data(config)
