"""A delta and its base make the network that was saved, bit for bit; any other base is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

import tiny
from checkpoint.altered import assert_equal, chain, changed, flipped, rewritten, shake
from oracles import identical
from regraft import create_model, diff, freeze, load, merge, replace_head, save, truncate, unfreeze
from regraft.card import attach
from regraft.checkpoint import read_header
from regraft.errors import CheckpointError

BASE = "resnet18@IMAGENET1K_V1"


@pytest.fixture(scope="module")
def pretrained() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return models.resnet18().state_dict()


@pytest.fixture
def registered(
    pretrained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, server_answers: None
) -> dict[str, torch.Tensor]:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pretrained)
    return pretrained


def stored(path: Path) -> set[str]:
    return set(safetensors.torch.load_file(path))


def test_save_over_registered_weights_takes_10_kilobytes_for_a_new_head(
    registered: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = create_model("resnet18", num_classes=2)
    freeze(model)
    unfreeze(model, "fc")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model.train()(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    figures = {
        "accuracy": 0.96,
        "loss": 0.1,
        "confusion": [[70, 3], [4, 76]],
        "per_class": {"ants": 0.95, "bees": 0.97},
    }
    attach(model, classes=("ants", "bees"), task="classification", metrics=figures)
    full = save(model, tmp_path / "full.safetensors")
    delta = save(model, tmp_path / "delta.safetensors", base="resnet18@IMAGENET1K_V1")
    assert stored(delta) == {"fc.weight", "fc.bias"}
    assert delta.stat().st_size <= 10_000
    assert full.stat().st_size > 44_000_000
    header = read_header(delta)
    assert header.base.name == BASE
    assert header.digest() == read_header(full).digest()
    loaded = load(delta)
    assert_equal(loaded, model.eval())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    images = torch.randn(2, 3, 64, 64)
    assert identical(loaded(images), model(images))
    merged = merge(delta, tmp_path / "merged.safetensors")
    assert merged.read_bytes() == full.read_bytes()


def test_save_over_registered_weights_takes_a_file_that_holds_the_same(
    registered: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("resnet18", num_classes=2)
    delta = save(model, tmp_path / "delta.safetensors", base="resnet18")
    assert read_header(delta).base.name == BASE
    torch.save(registered, tmp_path / "resnet18.pth")
    safetensors.torch.save_file(registered, tmp_path / "plain.safetensors")
    save(create_model("resnet18"), tmp_path / "full.safetensors")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(CheckpointError, match=r"the base 'resnet18@IMAGENET1K_V1' cannot be had: .*no network"):
        load(delta)
    for name in ("resnet18.pth", "plain.safetensors", "full.safetensors"):
        assert_equal(load(delta, base=tmp_path / name), model)


@pytest.mark.usefixtures("server_answers")
def test_save_over_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    pretrained = timm.create_model("test_resnet").state_dict()

    def with_weights(model: nn.Module, *_: object, **__: object) -> None:
        model.load_state_dict(pretrained)

    monkeypatch.setattr("timm.models._builder.load_pretrained", with_weights)
    model = create_model("timm/test_resnet", num_classes=2)
    delta = save(model, tmp_path / "delta.safetensors", base="timm/test_resnet@default")
    assert read_header(delta).base.name == "timm/test_resnet@r160_in1k"
    assert len(stored(delta)) == 2
    assert_equal(load(delta), model)


def test_save_compares_bits_with_the_base_and_not_values(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        base[0].weight[0] = torch.tensor([float("nan"), 0.0, 1.0])
        base[0].bias[0] = 0.0
    save(base, tmp_path / "base.safetensors")
    model = load(tmp_path / "base.safetensors")
    with torch.no_grad():
        model[0].bias[0] = -0.0
    model[1].half()
    delta = save(model, tmp_path / "delta.safetensors", base=tmp_path / "base.safetensors")
    assert stored(delta) == {"0.bias", "1.weight", "1.bias"}
    loaded = load(delta)
    assert_equal(loaded, model)
    assert loaded[1].weight.dtype == torch.float16


EDITS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "a head": lambda model: replace_head(model, 3),
    "cut": lambda model: truncate(model, drop=2),
    "all": shake,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shard_bytes", [10**9, 300])
def test_merge_writes_what_save_writes_and_every_edit_is_bit_equal(edit: str, shard_bytes: int, tmp_path: Path) -> None:
    base = save(shake(tiny.build("sequential")), tmp_path / "base.safetensors", shard_bytes=shard_bytes)
    model = EDITS[edit](load(base).train()).eval()
    delta = save(model, tmp_path / "delta.safetensors", base=base, shard_bytes=shard_bytes)
    assert_equal(load(delta), model)
    full = save(model, tmp_path / "full.safetensors")
    merged = merge(delta, tmp_path / "merged.safetensors")
    assert merged.read_bytes() == full.read_bytes()
    assert diff(delta, full).identical
    if edit == "nothing":
        assert read_header(delta).digests == {}


def test_save_tied_weights_over_untied_ones_and_back(own: str, tmp_path: Path) -> None:
    tied = create_model(own, trust_code=True)
    untied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    base = save(untied, tmp_path / "untied.safetensors")
    again = load(base)
    again[1].weight = again[0].weight
    delta = save(again, tmp_path / "tied.safetensors", base=base)
    assert stored(delta) == set()
    loaded = load(delta)
    assert loaded[1].weight is loaded[0].weight
    assert_equal(loaded, again)
    back = load(delta)
    back[1].weight = nn.Parameter(back[0].weight.detach().clone())
    third = save(back, tmp_path / "back.safetensors", base=delta)
    assert stored(third) == set()
    assert_equal(load(third), back)
    path = save(tied, tmp_path / "own.safetensors")
    assert_equal(load(save(changed(tied, "head.bias"), tmp_path / "d", base=path), trust_code=True), tied)


def test_merge_deltas_over_deltas(tmp_path: Path) -> None:
    path, model = chain(tmp_path, 16)
    assert stored(path) == {"1.weight"}
    assert_equal(load(path), model)
    with pytest.raises(CheckpointError, match=r"is a delta over 16 others already.*regraft merge"):
        save(model, tmp_path / "17.safetensors", base=path)
    full = merge(path, tmp_path / "full.safetensors")
    again = save(changed(model, "7.bias"), tmp_path / "17.safetensors", base=full)
    assert_equal(load(again), model)
    (tmp_path / "8.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"9\.safetensors' is a delta over 8\.safetensors \(digest [0-9a-f]{12}…\)"
    ):
        load(path)


def test_load_and_merge_take_a_folder_with_bases(tmp_path: Path) -> None:
    path, model = chain(tmp_path, 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = Path(shutil.move(path, elsewhere))
    with pytest.raises(CheckpointError, match=r"which is not in '.*elsewhere'\. Put it there, or say where it is"):
        load(moved)
    assert_equal(load(moved, base=tmp_path), model)
    assert_equal(load(moved, base=tmp_path / "1.safetensors"), model)
    assert_equal(load(merge(moved, elsewhere / "full.safetensors", base=tmp_path)), model)


def test_load_refuses_another_base_and_names_the_one_that_is_needed(
    tmp_path: Path, random_state: Callable[[], tuple[object, ...]]
) -> None:
    path, _ = chain(tmp_path, 1)
    needed = read_header(tmp_path / "0.safetensors").digest()
    other = save(tiny.build("sequential", seed=5), tmp_path / "other.safetensors")
    torch.save(tiny.build("sequential", seed=5).state_dict(), tmp_path / "other.pth")
    state = random_state()
    for base in (other, tmp_path / "other.pth", path):
        with pytest.raises(CheckpointError) as caught:
            load(path, base=base)
        assert f"is a delta over 0.safetensors (digest {needed[:12]}…), and '" in str(caught.value)
        assert "Give the one that it was made from" in str(caught.value)
    shutil.copy(other, tmp_path / "0.safetensors")
    with pytest.raises(CheckpointError, match=rf"{needed[:12]}"):
        load(path)
    assert random_state() == state


def test_load_refuses_a_base_whose_header_lies(tmp_path: Path) -> None:
    path, _ = chain(tmp_path, 1)
    base = tmp_path / "0.safetensors"
    flipped(base)
    with pytest.raises(CheckpointError, match=r"0\.safetensors' is damaged: '.*' is not what was saved"):
        load(path)


def set_whole(document: dict[str, Any]) -> None:
    document["whole"] = "0" * 64


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "whole": (set_whole, "it does not make the network that was saved"),
    "removed": (lambda document: document.update(removed=["0.weight"]), "it does not make the network"),
    "shared": (lambda document: document.update(shared={"0.weight": "nowhere"}), "it does not make the network"),
    "no whole": (lambda document: document.update(whole=None), "base and whole belong together"),
    "no base": (lambda document: document.update(base=None), "base and whole belong together"),
    "digest": (lambda document: document["base"].update(digest="1"), "does not fit the format 1.0: base.digest"),
    "kind": (lambda document: document["base"].update(kind="url"), "does not fit the format 1.0: base.kind"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_load_and_merge_refuse_a_damaged_delta(case: str, tmp_path: Path) -> None:
    path, _ = chain(tmp_path, 1)
    rewritten(path, DAMAGES[case][0])
    for attempt in (lambda: load(path), lambda: merge(path, tmp_path / "out.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert DAMAGES[case][1] in str(caught.value)
        assert str(path) in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


PLACES = [
    ("file", "../outside/0.safetensors"),
    ("file", "/outside/0.safetensors"),
    ("file", "below/0.safetensors"),
    ("file", "..\\outside\\0.safetensors"),
    ("file", ".."),
    ("file", ""),
    ("file", "https://example.org/0.safetensors"),
    ("registered", "py:outside.py:Net@default"),
    ("registered", "../outside/0.safetensors@default"),
    ("registered", "resnet18@../../outside/0.safetensors"),
    ("registered", "resnet18"),
    ("registered", "hf-hub:someone/something@main"),
]


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_load_follows_a_base_nowhere_else(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    path, _ = chain(folder, 1)
    for place in ("outside", "named/below"):
        (tmp_path / place).mkdir()
        shutil.copy(folder / "0.safetensors", tmp_path / place)
    rewritten(path, lambda document: document["base"].update(kind=kind, name=name))
    monkeypatch.setattr("regraft.zoo._import_file", lambda *_: pytest.fail("imported"))
    for base in (None, folder):
        with pytest.raises(CheckpointError, match=r"does not fit the format 1\.0: base: .*is not"):
            load(path, base=base, trust_code=True)


def test_load_follows_no_link_beside_the_delta_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    path, model = chain(folder, 1)
    secret = Path(shutil.move(folder / "0.safetensors", tmp_path / "secret.safetensors"))
    (folder / "0.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link to another folder"):
        load(path)
    assert_equal(load(path, base=secret), model)
    assert_equal(load(path, base=folder / "0.safetensors"), model)


def test_save_refuses_what_is_no_base_and_writes_nothing(tmp_path: Path) -> None:
    model = tiny.build("sequential")
    path = save(model, tmp_path / "model.safetensors")
    raw = path.read_bytes()
    for base, message in {
        "nowhere.safetensors": "no base 'nowhere.safetensors': it is neither a file",
        "resnet19@IMAGENET1K_V1": "no base 'resnet19@IMAGENET1K_V1'",
        "resnet18@none": "its weights are drawn anew each time",
        "resnet18@IMAGENET1K_V7": "cannot be had: no weights 'IMAGENET1K_V7' for resnet18",
        "py:own.py:Net": "no base 'py:own.py:Net'",
        str(path): "cannot be its own base",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            save(changed(model, "7.bias"), path, base=base)
        assert message in str(caught.value)
    assert path.read_bytes() == raw
    assert list(tmp_path.iterdir()) == [path]


def test_load_refuses_deltas_that_are_based_on_each_other(tmp_path: Path) -> None:
    path, _ = chain(tmp_path, 2)
    middle = tmp_path / "1.safetensors"
    digest = read_header(path).digest()
    rewritten(middle, lambda document: document["base"].update(name="2.safetensors", digest=digest))
    with pytest.raises(CheckpointError, match=r"2\.safetensors' is based on itself, by way of '"):
        load(path)


def test_merge_refuses_a_full_file(tmp_path: Path) -> None:
    path = save(tiny.build("sequential"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no delta: it holds all of its tensors"):
        merge(path, tmp_path / "out.safetensors")


def test_merge_keeps_fields_that_it_does_not_know(tmp_path: Path) -> None:
    path, _ = chain(tmp_path, 1)
    rewritten(path, lambda document: document.update(novelty={"a": 1}))
    assert read_header(merge(path, tmp_path / "full.safetensors")).model_extra == {"novelty": {"a": 1}}
