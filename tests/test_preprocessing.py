"""What other libraries say of their networks' images, held against what their own code does to photos."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import regraft
from regraft.card import Preprocessing
from regraft.data.decoding.files import decode
from regraft.data.transforms import center_crop, normalize
from regraft.errors import ModelError
from regraft.zoo import preprocessing_of, preprocessing_source
from training.factories import Lines, write_photos

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = [(640, 480), (200, 333), (500, 282)]
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 48, "width": 48}},
    "DeiTImageProcessor": {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}},
    "BitImageProcessor": {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "resample": 2},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 224}},
    "LevitImageProcessor": {},
    "MobileNetV2ImageProcessor": {},
    "EfficientNetImageProcessor": {},
    "SegformerImageProcessor": {"do_normalize": False},
    "SiglipImageProcessor": {},
}


def photo(width: int, height: int) -> Image.Image:
    """Return an image of smooth shapes, as in photos: resizing filters that round differently agree on it."""
    y, x = np.mgrid[0:height, 0:width] / 60
    return Image.fromarray((127 + 120 * np.sin(np.stack([x, y, x * y / 3], 2))).astype(np.uint8))


def prepared(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    pixels = center_crop(preprocessing.size, preprocessing.border)(decode(image, preprocessing))
    return normalize(pixels[None], preprocessing)


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_of_an_image_processor_gives_what_it_gives(name: str) -> None:
    processor = getattr(transformers, name)(**PROCESSORS[name])
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.preprocessing = processor
    found = preprocessing_of(model)
    for size in SIZES:
        expected = processor(images=photo(*size), return_tensors="pt")["pixel_values"]
        difference = (prepared(photo(*size), found) - expected).abs()
        assert difference.mean() < 0.05, (name, size)  # theirs rounds down where half a pixel is left at both sides


def vit(**options: Any) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.ViTForImageClassification(config, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    vit().save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3
    )
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_preprocessing_of_a_loaded_network_is_that_of_the_processor_beside_it(saved: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(saved)
    expected = Preprocessing(
        size=32, resize=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic", crop_mode="squash"
    )
    assert preprocessing_of(model) == expected
    assert preprocessing_of(nn.ModuleDict({"backbone": model})) == expected
    assert str(saved) in str(preprocessing_source(model))


def test_preprocessing_of_a_network_without_a_processor_is_the_architectures_at_its_size(saved: Path) -> None:
    for model in (vit(), transformers.ViTForImageClassification.from_pretrained(saved.rename(saved.parent / "bare"))):
        for file in (saved.parent / "bare").glob("*processor*"):
            file.unlink()
        model = model if model.name_or_path == "" else type(model).from_pretrained(saved.parent / "bare")
        found = preprocessing_of(model)
        assert (found.size, found.resize, found.crop_mode) == (32, 32, "squash")
        assert found.mean == tuple(transformers.ViTImageProcessor.image_mean)
        assert "no image processor lies beside the weights" in str(preprocessing_source(model))


def test_fit_and_predict_prepare_photos_as_the_networks_own_processor(saved: Path, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = transformers.ViTForImageClassification.from_pretrained(saved)
            self.seen: list[torch.Tensor] = []

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            if not self.training:
                self.seen.append(pixel_values.detach().clone())
            return self.vit(pixel_values).logits

    model, lines = Net(), Lines()
    write_photos(tmp_path / "photos", 6)
    regraft.fit(model, tmp_path / "photos", epochs=1, augment="none", progress=lines)
    assert any(line.startswith("images     both sides to 32") and "image processor of" in line for line in lines.lines)
    model.seen.clear()
    file = tmp_path / "photos" / "val" / "dark" / "0.png"
    regraft.predict(model, file)
    processor = transformers.AutoImageProcessor.from_pretrained(saved)
    expected = processor(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(model.seen[-1], expected, atol=0.05)
    assert preprocessing_of(copy.deepcopy(model)).mean == (0.1, 0.2, 0.3)


def test_preprocessing_of_a_network_of_timm_within_another_is_timms() -> None:
    inner = timm.create_model("test_vit")
    assert preprocessing_of(nn.Sequential(inner, nn.Linear(1000, 2))) == preprocessing_of(inner)
    gray = preprocessing_of(timm.create_model("test_vit", in_chans=1))
    assert gray.mean == (pytest.approx(sum(preprocessing_of(inner).mean) / 3),)


def test_preprocessing_of_what_is_no_images_is_the_usual() -> None:
    text = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    assert preprocessing_of(text) == Preprocessing()
    assert preprocessing_source(text) is None


def test_preprocessing_of_refuses_an_image_processor_without_a_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.preprocessing = transformers.Siglip2ImageProcessor()
    with pytest.raises(ModelError, match="Siglip2ImageProcessor gives images of no fixed size"):
        preprocessing_of(model)
