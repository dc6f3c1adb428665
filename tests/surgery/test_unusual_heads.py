"""Heads that are not one linear layer in front of the output: auxiliary, convolutional, missing, Hugging Face's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models

import tiny
from oracles import identical, same, snapshot
from regraft import replace_head
from regraft.anatomy.heads import find_heads
from regraft.anatomy.model_facts import ModelFacts
from regraft.training.loop import train_epoch
from regraft.training.steps.compute import ComputeContext
from surgery.models import NEW, without_init

AUXILIARY: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "inception_v3": (lambda: without_init(lambda: models.inception_v3(init_weights=False)), 299, ["AuxLogits.fc"]),
    "googlenet": (lambda: without_init(lambda: models.googlenet(init_weights=False)), 64, ["aux1.fc2", "aux2.fc2"]),
}


@pytest.mark.parametrize("name", AUXILIARY)
def test_replace_head_gives_auxiliary_classifiers_as_many_classes_and_they_train(name: str) -> None:
    make, side, auxiliary = AUXILIARY[name]
    model = make()
    assert ModelFacts(model).auxiliary_heads(find_heads(model)) == auxiliary
    edited = replace_head(model, 2, keep={5: 1})
    for path in [*auxiliary, "fc"]:
        assert identical(edited.get_submodule(path).weight[1], model.get_submodule(path).weight[5])
    images, classes = torch.randn(2, 3, side, side), torch.tensor([0, 1])
    outputs = edited.train()(images)
    assert [tuple(output.shape) for output in outputs] == [(2, 2)] * (1 + len(auxiliary))
    optimizer = torch.optim.SGD(edited.parameters(), lr=0.01)
    schedule, scaler = torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.amp.GradScaler("cpu", enabled=False)
    before = edited.fc.weight.clone()
    engine = ComputeContext(torch.device("cpu"))
    loss = train_epoch(edited, [(images, classes)], nn.CrossEntropyLoss(), optimizer, schedule, scaler, engine)
    assert loss > 0
    assert not identical(before, edited.fc.weight)
    assert edited.eval()(images).shape == (2, 2)


def test_model_facts_auxiliary_heads_leave_out_a_layer_that_never_runs_and_has_another_width() -> None:
    model = tiny.build("aux-head")
    assert ModelFacts(model).auxiliary_heads(find_heads(model)) == ["aux"]
    model.aux = nn.Linear(6, tiny.CLASSES + 1)
    assert ModelFacts(model).auxiliary_heads(find_heads(model)) == []


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_replace_head_keeps_all_settings_of_a_convolution_as_the_head(dimensions: int) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    settings: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"}
    model = nn.Sequential(kind(3, 4, 3), kind(4, 5, 3, **settings))
    inputs = torch.randn(2, 3, *[9] * dimensions)
    edited = replace_head(model, NEW, inputs=inputs)
    assert (edited(inputs).shape[1], *edited(inputs).shape[2:]) == (NEW, *model(inputs).shape[2:])
    assert all(getattr(edited[1], key) == getattr(model[1], key) for key in settings)


def test_replace_head_takes_inputs_that_say_which_layer_is_the_head() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.body = nn.Linear(5, 8)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(torch.cat([left, right], 1)))

    inputs = (torch.randn(2, 2), torch.randn(2, 3))
    assert replace_head(TwoInputs(), NEW, inputs=inputs)(*inputs).shape == (2, NEW)


@pytest.mark.parametrize("name", ["dla34", "resnetv2_18", "repvit_m1", "efficientvim_m1", "cpubone_nano"])
def test_replace_head_gives_timms_networks_without_a_head_the_one_that_their_class_builds(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this release of timm does not know {name}")
    model = timm.create_model(name, num_classes=0).half().eval()
    before = snapshot(model)
    edited = replace_head(model, NEW)
    theirs = timm.create_model(name, num_classes=0)
    theirs.reset_classifier(NEW)
    assert same(before, snapshot(model))
    shapes = {key: tensor.shape for key, tensor in edited.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {p.dtype for p in edited.parameters()} == {torch.float16}
    for classes in range(2, 10):  # a new layer may take the place in memory of one that is gone
        assert not any(layer.training for layer in replace_head(model, classes).modules())
    assert not any(layer.training for layer in edited.modules())
    kept = model.state_dict(keep_vars=True)
    assert all(tensor is kept[key] for key, tensor in edited.state_dict(keep_vars=True).items() if key in kept)
    assert edited.float()(torch.randn(2, *model.pretrained_cfg["input_size"])).shape == (2, NEW)


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], int]] = {  # the class, its configuration, the side of images
    "ViT": ("ViTForImageClassification", "ViTConfig", HIDDEN | {"image_size": 16, "patch_size": 8}, 16),
    "BERT": ("BertForSequenceClassification", "BertConfig", HIDDEN | {"vocab_size": 50}, 0),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        32,
    ),
    "ConvNext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        64,
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers' own modules
@pytest.mark.parametrize("before", [1, 2, NEW])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_replace_head_lets_the_loss_of_hugging_face_networks_go_on_with_the_new_labels(name: str, before: int) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, config_kind, options, side = HUGGING_FACE[name]
    labels = {index: f"animal {index}" for index in range(before)}
    config = getattr(transformers, config_kind)(**options, id2label=labels, label2id={v: k for k, v in labels.items()})
    model: nn.Module = getattr(transformers, kind)(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, side, side)} if side else {"input_ids": torch.randint(50, (2, 6))}
    model(**inputs, labels=torch.zeros(2) if before == 1 else torch.zeros(2, dtype=torch.long))  # settles the problem
    untouched = copy.deepcopy(model.config.to_dict())
    edited = replace_head(model, NEW)
    classes = torch.tensor([NEW - 1, 0])
    output = edited.eval()(**inputs, labels=classes)
    assert output.logits.shape == (2, NEW)
    assert torch.allclose(output.loss, nn.functional.cross_entropy(output.logits, classes))
    assert edited.config.num_labels == edited.num_labels == NEW
    assert edited.config.id2label == {index: f"LABEL_{index}" for index in range(NEW)}
    assert edited.config.label2id == {label: index for index, label in edited.config.id2label.items()}
    assert model.config.to_dict() == untouched
    assert model.num_labels == before
