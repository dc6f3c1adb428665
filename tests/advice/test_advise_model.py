"""`advise` from the photos to the training that follows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regraft
import tiny
from oracles import identical
from regraft.advice.result import EVERYTHING, HEAD_ONLY
from regraft.errors import ConfigError, DataError
from scene import write_folder, write_photo


class Blocks(nn.Module):
    """Two blocks and a head, on images of 8 pixels."""

    preprocessing = tiny.PlainCnn.preprocessing

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.second(self.first(x)).mean((2, 3))))


class Blind(Blocks):
    """Its head sees the same of every photo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop((0 * self.second(self.first(x))).mean((2, 3)) + 1))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = write_folder(tmp_path / "photos" / "train", count=8)
    write_folder(tmp_path / "photos" / "val", count=3)
    (root / "cats" / "broken.png").write_text("no photo")
    return root.parent


def ask(model: Any, data: Any, **options: Any) -> Any:
    return regraft.advise(model, data, **{"progress": False, "trust_code": True, **options})


@pytest.mark.parametrize(("depth", "augment"), [("fc", "flip"), ("fc", "none"), ("second", "flip"), (None, "flip")])
def test_advise_leaves_nothing_to_compute_for_the_training(
    depth: str | None, augment: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.advice import one_model
    from regraft.advice.decision import Decision

    index = {"fc": 2, "second": 1, None: 0}[depth]
    monkeypatch.setattr(
        one_model, "decide", lambda depths, *_, **__: Decision(min(index, len(depths) - 1), "open", "so")
    )
    model = Blocks()
    advice = ask(model, photos, augment=augment)
    assert advice.depths[0].name == EVERYTHING
    assert advice.depths[-1].name == HEAD_ONLY
    decoded: list[Any] = []
    from regraft.data.decoding import files

    real = files.decode
    monkeypatch.setattr(files, "decode", lambda path, *rest: decoded.append(path) or real(path, *rest))
    monkeypatch.setattr("regraft.data.photos.decode_all", lambda *_, **__: pytest.fail("photos are decoded again"))
    result = regraft.fit(model, photos, augment=augment, epochs=1, progress=False, **advice.options)
    assert result.plan.train_count == 16
    if depth is None:
        assert result.computed_once is None
    else:
        assert result.computed_once is not None
        assert result.computed_once.was_found


def test_advise_leaves_the_network_as_it_is(photos: Path, random_state: Any) -> None:
    model = Blocks().train()
    model.first.requires_grad_(False)
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, random_state()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    advice = ask(model, photos)
    assert all(identical(before[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert model.training
    assert random_state() == state
    assert all(not layer._forward_hooks for layer in model.modules())
    assert advice.options["unfreeze_all"]  # as it comes partly frozen
    again = ask(model, photos)  # found in the cache
    assert [(d.score, d.logme) for d in again.depths] == [(d.score, d.logme) for d in advice.depths]
    assert again.options == advice.options
    advice.apply(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {"fc.weight", "fc.bias"}


def test_advise_trains_everything_where_the_head_sees_nothing(photos: Path) -> None:
    torch.manual_seed(0)
    advice = ask(Blind(), photos)
    assert advice.recommended.name == EVERYTHING or advice.recommended.name == "after first"
    assert "the last layers lack what this task asks for" in advice.sentence
    assert advice.depths[-1].score < 0.7 < max(depth.score for depth in advice.depths[:-1])


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (
            lambda root: write_folder(root / "train", count=1),
            ("With one photo of a class none can be left out", "Two photos or more of each class"),
        ),
        (lambda root: write_folder(root / "train", count=3), ()),
    ],
    ids=["one image a class", "fewer images than folds"],
)
def test_advise_says_what_few_photos_leave_open(write: Any, parts: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path / "few")
    write_folder(tmp_path / "few" / "val", count=1)
    advice = ask(Blocks(), tmp_path / "few")
    text = str(advice)
    assert all(part in text for part in parts)
    assert advice.recommended is not None
    assert (advice.head_score is None) == bool(parts)
    assert all(depth.trainable and depth.epoch_s is not None and depth.memory_bytes for depth in advice.depths)


def test_advise_says_what_it_cannot_determine(photos: Path) -> None:
    alone = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    regraft.card.attach(alone, preprocessing=regraft.Preprocessing(size=8, resize=8))
    advice = ask(alone, photos)
    assert advice.recommended is None
    assert "no layer before its head" in advice.undetermined[0]
    assert "No depth can be recommended for Sequential" in advice.sentence
    short = ask(Blocks(), photos, budget=1e-9)
    assert short.recommended is None
    assert "more than the budget: nothing was probed" in str(short)
    assert [depth.trainable for depth in short.depths] == sorted((d.trainable for d in short.depths), reverse=True)
    one = regraft.data.photos.Photos  # a pair of photos of one class
    train, validation = (
        one(
            tuple(regraft.data.samples.Sample(photos / "train" / "cats" / f"{i}.png", 0) for i in range(4)),
            regraft.Preprocessing(size=8, resize=8),
            regraft.data.transforms.augmentation("none", regraft.Preprocessing(size=8, resize=8)),
            ("cats",),
        )
        for _ in range(2)
    )
    assert "There is one class" in str(ask(Blocks(), (train, validation)))


def test_advise_ranks_several_networks(photos: Path) -> None:
    torch.manual_seed(0)
    ranking = ask([Blind(), Blocks()], photos)
    assert [advice.model for advice in ranking.advices] == ["Blocks", "Blind"]
    assert "the best of 2" in ranking.sentence
    assert ranking.to_dict()["advices"][0]["model"] == "Blocks"


def test_advise_takes_numbers(tmp_path: Path) -> None:
    rows = [
        f"{write_photo(tmp_path / f'{n}.png', 5 * n).name},{n / 10},{'val' if n % 4 == 0 else 'train'}"
        for n in range(24)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,target,split", *rows]))
    advice = ask(Blocks(num_classes=1), tmp_path / "table.csv")
    assert advice.task == "regression"
    assert max(depth.score for depth in advice.depths) > 0.9  # brightness is in the pixels
    assert "R²" in str(advice)


def test_advise_refuses_what_it_gives_itself_and_what_it_cannot_look_at(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"^freeze_until is what the advice gives\. Leave it out\."):
        ask(Blocks(), photos, freeze_until="first")
    with pytest.raises(ConfigError, match="budget is 'soon', expected a time as in 90s, 10m or 2h"):
        ask(Blocks(), photos, budget="soon")
    with pytest.raises(ConfigError, match="model is an empty list"):
        ask([], photos)
    pair = [torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)] * 2
    with pytest.raises(DataError, match="advise needs photos: a folder, shards"):
        ask(Blocks(), pair)
