import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import models

import regraft
from oracles import identical
from regraft import Preprocessing, create_model, list_models, summary
from regraft.card import attach, card_of
from regraft.data.decoding.files import decode
from regraft.data.transforms import center_crop, normalize
from regraft.errors import ConfigError, InputError, ModelError, TrustError
from regraft.training.config import TrainConfig
from regraft.zoo import build, import_object, preprocessing_of

OWN = """
from torch import nn
made = []

class Own(nn.Module):
    preprocessing = {"size": 20, "resize": 24, "mean": (0.4,), "std": (0.2,), "interpolation": "bicubic"}
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        made.append(self)
    def forward(self, x):
        return self.conv(x).mean((2, 3))

def function(): return Own()
class Needs(nn.Module):
    def __init__(self, width): super().__init__()
class Fails(nn.Module):
    def __init__(self): raise OSError("no disk")
def text(): return "text"
class BadPreprocessing(Own):
    preprocessing = {"size": 30, "resize": 0}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_list_models_lists_all_of_torchvisions_and_timms_networks() -> None:
    names = list_models()
    assert [name for name in names if "/" not in name] == models.list_models(module=models)
    assert [name.removeprefix("timm/") for name in names if "/" in name] == timm.list_models()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("vgg11*", ["vgg11", "vgg11_bn"]), ("timm/convnext_atto", ["timm/convnext_atto"]), ("xyzzy*", [])],
)
def test_list_models_filters_by_a_glob(pattern: str, expected: list[str]) -> None:
    assert list_models(pattern) == expected


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "vit_b_16", "inception_v3"])
def test_preprocessing_of_networks_of_torchvision_is_that_of_their_weights(name: str) -> None:
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    with torch.device("meta"):
        found = preprocessing_of(build(name))
    assert (found.size, found.resize) == (transforms.crop_size[0], transforms.resize_size[0])
    assert (list(found.mean), list(found.std)) == (transforms.mean, transforms.std)
    assert found.interpolation == transforms.interpolation.value


@pytest.mark.parametrize("name", ["test_vit", "convnext_atto", "levit_128s"])
def test_preprocessing_of_networks_of_timm_is_that_of_their_configuration(name: str) -> None:
    config = timm.data.resolve_data_config({}, model=timm.create_model(name))
    found = preprocessing_of(build(f"timm/{name}"))
    assert found.input_size[1:] == config["input_size"]
    assert (found.mean, found.std, found.interpolation) == (config["mean"], config["std"], config["interpolation"])


@pytest.mark.parametrize(
    ("name", "crop_mode", "is_padded"),
    [
        ("resnet18.a1_in1k", "center", False),
        ("tiny_vit_21m_512.dist_in22k_ft_in1k", "squash", False),
        ("convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384", "squash", False),
        ("deepseek_vit_412m.deepseek_v4_1_flash", "border", False),
        ("volo_d5_448.sail_in1k", "center", True),
    ],
)
def test_preprocessing_of_photos_is_that_of_timms_transforms(name: str, crop_mode: str, is_padded: bool) -> None:
    config = timm.get_pretrained_cfg(name)
    if config is None:
        pytest.skip(f"this timm has no {name}")
    holder = nn.Identity()
    holder.pretrained_cfg = config.to_dict()
    found = preprocessing_of(holder)
    assert found.crop_mode == crop_mode
    assert (found.resize < found.size) == is_padded
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=holder))
    for size in [(640, 480), (200, 333), (90, 90), (700, 250)]:
        photo = Image.fromarray(np.random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        ours = center_crop(found.size, found.border)(decode(photo, found))
        assert torch.allclose(normalize(ours[None], found)[0], transform(photo), atol=1e-5), size


def test_preprocessing_of_a_saved_model_keeps_how_its_images_are_cropped(tmp_path: Path) -> None:
    preprocessing = Preprocessing(size=32, resize=28, crop_mode="border")
    model = attach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), preprocessing=preprocessing)
    assert preprocessing_of(regraft.load(regraft.save(model, tmp_path / "a.safetensors"))) == preprocessing
    assert Preprocessing(size=32, resize=36).crop_mode == "center"  # as files of earlier versions have it


@pytest.mark.parametrize("class_name", ["Own", "function"])
def test_create_model_takes_a_class_or_a_function_of_ones_own(own: Path, class_name: str) -> None:
    model = create_model(f"py:{own}:{class_name}", trust_code=True)
    assert preprocessing_of(model) == Preprocessing(
        size=20, resize=24, mean=(0.4,), std=(0.2,), interpolation="bicubic"
    )
    assert summary(model).input_shape == (1, 1, 20, 20)


def test_create_model_imports_one_file_once(own: Path) -> None:
    first, second = (create_model(f"py:{own}:Own", trust_code=True) for _ in range(2))
    assert type(first) is type(second)


def test_create_model_imports_a_changed_file_again(own: Path) -> None:
    create_model(f"py:{own}:Own", trust_code=True)
    own.write_text(OWN.replace("nn.Conv2d(1, 4, 3)", "nn.Conv2d(1, 40, 3)"))
    assert create_model(f"py:{own}:Own", trust_code=True).conv.out_channels == 40


def test_create_model_names_a_module_of_ones_own_by_its_package(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(own.parent))
    own.rename(own.with_name("own_package_7.py"))
    assert type(create_model("py:own_package_7:Own", trust_code=True)).__name__ == "Own"


def test_import_object_imports_nothing_without_trust(own: Path) -> None:
    with pytest.raises(TrustError, match="If you know and trust it, pass trust_code=True"):
        import_object(f"py:{own}:made", trust_code=False)
    assert import_object(f"py:{own}:made", trust_code=True) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8", "no model 'resnet8'. Nearest: 'resnet18'"),
        ("convnext_atto", "Did you mean 'timm/convnext_atto'?"),
        ("timm/resnet18x", "no model 'timm/resnet18x'. Nearest: 'timm/resnet18"),
        ("", "the name is empty."),
        ("py:nowhere.py:Net", "no file 'nowhere.py'"),
        ("py:nowhere", "is not of the form py:path/file.py:Name"),
        ("py:{own}:Onw", "no 'Onw' in {own}. Nearest: 'Own'"),
        ("py:{own}:Needs", "Give each argument of its constructor a default"),
        ("py:{own}:Fails", "raised OSError: no disk"),
        ("py:{own}:text", "gave a str, expected a torch.nn.Module"),
        ("py:{own}:BadPreprocessing", "the attribute `preprocessing` of BadPreprocessing is not usable"),
        ("py:no_such_package_x:Net", "no_such_package_x"),
    ],
)
def test_create_model_refuses_a_name_that_cannot_be_built(name: str, message: str, own: Path) -> None:
    with pytest.raises(ModelError) as caught:
        create_model(name.format(own=own), weights="none", trust_code=True)
    assert message.format(own=own) in str(caught.value)


def test_create_model_lists_the_known_weights_for_unknown_ones() -> None:
    with pytest.raises(ModelError, match=r"no weights 'V9' for resnet18: .*IMAGENET1K_V1"):
        create_model("resnet18", weights="V9")


def test_card_of_a_network_says_where_it_comes_from() -> None:
    recipe = card_of(build("squeezenet1_1")).recipe
    assert recipe is not None
    assert (recipe.source.name, recipe.source.weights, recipe.steps) == ("squeezenet1_1", "none", ())


def test_create_model_gives_the_network_of_its_library() -> None:
    torch.manual_seed(3)
    ours = create_model("mobilenet_v3_small", weights="none")
    torch.manual_seed(3)
    theirs = models.mobilenet_v3_small()
    assert all(identical(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize(
    ("model", "channels"), [(nn.Conv2d(1, 2, 3), 1), (nn.Conv2d(3, 2, 3), 3), (nn.Linear(3, 2), 3)]
)
def test_preprocessing_of_guesses_channels_from_the_first_convolution(model: nn.Module, channels: int) -> None:
    assert preprocessing_of(model).channels == channels


def test_list_models_downloads_nothing(tmp_path: Path) -> None:
    code = "import regraft; assert len(regraft.list_models()) > 500"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/test_vit"])
def test_create_model_takes_none_for_no_weights(name: str) -> None:
    torch.manual_seed(1)
    ours = create_model(name, weights=None)
    torch.manual_seed(1)
    theirs = create_model(name, weights="none")
    assert all(identical(t, theirs.state_dict()[key]) for key, t in ours.state_dict().items())
    assert card_of(ours) == card_of(theirs)


@pytest.mark.parametrize(
    "weights",
    [
        models.ResNet18_Weights.DEFAULT,
        models.ResNet18_Weights.IMAGENET1K_V1,
        "ResNet18_Weights.IMAGENET1K_V1",
        "ResNet18_Weights.DEFAULT",
        "DEFAULT",
        "default",
    ],
)
@pytest.mark.usefixtures("server_answers")
def test_create_model_takes_torchvisions_own_names_of_weights(weights: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_model(name: str, weights: object, **options: object) -> nn.Module:
        asked.append(weights)
        return models.resnet18(weights=None)

    monkeypatch.setattr(models, "get_model", get_model)
    create_model("resnet18", weights=weights)
    assert asked == [models.ResNet18_Weights.IMAGENET1K_V1]


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet18", models.ResNet50_Weights.DEFAULT, "ResNet50_Weights.IMAGENET1K_V2 are weights of another network"),
        ("resnet18", "ResNet50_Weights.DEFAULT", "'resnet18' takes ResNet18_Weights"),
        ("timm/test_vit", models.ResNet18_Weights.DEFAULT, "'timm/test_vit' is no network of torchvision"),
        ("resnet18", True, "weights is True, expected a name"),
        ("resnet18", {"fc.bias": torch.ones(2)}, "weights is a dict, expected a string or a Path"),
    ],
)
def test_create_model_refuses_weights_of_another_kind(name: str, weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(name, weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, "no argument 'pretrained'.*Write weights=\"default\""),
        ({"num_class": 3}, "no argument 'num_class'.*Nearest: 'num_classes'"),
        ({"in_chans": 1}, "replace_stem"),
        ({"xyzzy": 1}, "It takes weights, num_classes, trust_code"),
    ],
)
def test_create_model_refuses_arguments_that_it_does_not_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("resnet18", weights=None, **options)


@pytest.mark.parametrize("weights", [None, "none"])
def test_train_config_takes_none_for_no_weights(weights: object) -> None:
    assert TrainConfig(weights=weights).weights == "none"  # type: ignore[arg-type]
