"""Calibrated probabilities, and photos that resemble no class."""

from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F

import regraft
import tiny
from regraft.card import FamiliarPhotos
from regraft.errors import ArgumentError, ConfigError, ModelError
from regraft.training.doubt.calibration import calibrate
from regraft.training.doubt.familiarity import head_inputs, remember, resemblance
from regraft.training.metrics import calibration_error
from training.by_hand import built, write_photos


def test_calibrate_makes_scores_as_sure_as_they_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2_000, 4, generator=generator)
    targets = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    calibration = calibrate(5 * scores, targets)
    assert calibration is not None
    assert calibration.factor == pytest.approx(0.2, rel=0.1)
    assert calibration.error_before == pytest.approx(calibration_error(5 * scores, targets))
    assert calibration.error_before > 0.1
    assert calibration.error_after < 0.03
    assert calibrate(scores[:19], targets[:19]) is None


def test_resemblance_is_by_the_fifth_nearest_by_angle() -> None:
    generator = torch.Generator().manual_seed(0)
    training, validation, others = (torch.randn(count, 24, generator=generator) + 1 for count in (80, 40, 30))
    others[0] = -training.sum(0)  # turned away from all
    photos = remember("fc", training, validation)
    assert photos is not None
    nearest = NearestNeighbors(n_neighbors=5, metric="cosine").fit(training.numpy())
    of_validation, of_others = (nearest.kneighbors(rows.numpy())[0][:, -1] for rows in (validation, others))
    expected = (of_validation[None] >= of_others[:, None]).mean(1)
    assert (resemblance(others, photos) - torch.from_numpy(expected)).abs().max() < 0.06  # features in 8 bits
    assert resemblance(others[:1], photos)[0] == 0
    assert FamiliarPhotos.model_validate_json(photos.model_dump_json()) == photos


def test_remember_keeps_nothing_of_too_few_photos_or_of_features_that_tell_nothing() -> None:
    rows = torch.rand(20, 4)
    assert remember("fc", rows[:4], rows) is None
    assert remember("fc", rows, rows[:9]) is None
    assert remember("fc", torch.zeros(20, 4), rows) is None
    assert remember("fc", rows, rows.where(rows < 0.9, float("nan"))) is None


@pytest.mark.parametrize(("shape", "mean_over"), [((3, 5), ()), ((3, 5, 4, 4), (2, 3)), ((3, 7, 5), (1,))])
def test_head_inputs_are_means_of_maps_and_tokens(shape: tuple[int, ...], mean_over: tuple[int, ...]) -> None:
    layer, inputs = nn.Identity(), torch.rand(shape)
    with head_inputs(layer) as rows:
        layer(inputs)
    layer(inputs)
    assert torch.allclose(rows[0], inputs.mean(mean_over) if mean_over else inputs)
    assert len(rows) == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), 20, measured=20)


def head_rows(model: nn.Module, folder: Path) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    handle = model.get_submodule("fc").register_forward_pre_hook(lambda layer, inputs: rows.append(inputs[0]))
    regraft.predict(model, folder, device="cpu")
    handle.remove()
    return torch.cat(rows).detach()


@pytest.mark.parametrize("name", ["cnn, head", "cnn, half", "cnn"])
def test_predict_tells_how_far_photos_resemble_the_training_photos(name: str, photos: Path, tmp_path: Path) -> None:
    model = built(name if name != "cnn" else "cnn, head")
    if name == "cnn":
        regraft.unfreeze(model)
    result = regraft.fit(model, photos, out=str(tmp_path / "run"), device="cpu", epochs=2)
    assert result.calibration is not None
    assert result.calibration.is_from_training == (name == "cnn, head")
    training, validation = (head_rows(result.model, photos / part) for part in ("train", "val"))
    nearest = NearestNeighbors(n_neighbors=5, metric="cosine").fit(training.numpy())
    distances = nearest.kneighbors(validation.numpy())[0][:, -1]
    predictions = regraft.predict(regraft.load(tmp_path / "run", trust_code=True), photos / "val", device="cpu")
    shares = torch.tensor([one.resemblance for one in predictions])
    assert (shares - torch.from_numpy((distances[None] >= distances[:, None]).mean(1))).abs().max() < 0.15
    outputs = result.model(torch.ones(1, 3, tiny.SIDE, tiny.SIDE)).detach() * (
        result.model.regraft_card.confidence_factor or 1
    )
    (one,) = regraft.predict(result.model, torch.ones(1, 3, tiny.SIDE, tiny.SIDE), device="cpu")
    assert one.probability == pytest.approx(float(F.softmax(outputs, 1).max()), abs=1e-5)
    rejected = regraft.predict(result.model, photos / "val", reject=0.1, device="cpu")
    for before, after in zip(predictions, rejected, strict=True):
        is_unknown = (before.resemblance or 0) < 0.1
        assert (after.label, after.probability is None) == (("unknown", True) if is_unknown else (before.label, False))


def test_predict_refuses_to_reject_where_nothing_is_known(photos: Path) -> None:
    model = built("cnn, head")
    regraft.card.attach(model, classes=("a", "b"), task="classification")
    with pytest.raises(ModelError, match="does not know what its training photos look like"):
        regraft.predict(model, photos / "val", reject=0.05, device="cpu")
    with pytest.raises(ArgumentError, match=r"predict: reject=2, expected a share between 0 and 1"):
        regraft.predict(model, photos / "val", reject=2, device="cpu")


def test_familiar_photos_that_are_damaged_are_refused() -> None:
    for features in ("no base64!", "AAAA"):
        with pytest.raises(ConfigError, match=r"base64|no rows of 5"):
            FamiliarPhotos(layer="fc", width=5, features=features, distances=(0.1,))
