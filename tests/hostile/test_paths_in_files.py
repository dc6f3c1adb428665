"""What a file says can lead to no other file than those that the user named, and to no code."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import regraft
from hostile.crafted import document, write_with
from regraft.checkpoint import Plan, build_plan, read_plan
from regraft.errors import ConfigError, InputError, TrustError
from regraft.frontier.cache.store import Store
from scene import nothing_written

SECRET = "secret"  # stands in the name of every file that nothing may open
_opened: list[str] = []
_listens = False


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _listens and event in ("open", "import", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"):
        _opened.append(
            f"{event} {arguments[0]!r} {arguments[1]!r}" if event.startswith("socket") else str(arguments[0])
        )


sys.addaudithook(_heard)


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Give the names of whatever is opened, listed, imported or connected to inside of the block."""
    global _listens
    _opened.clear()
    _listens = True
    try:
        yield _opened
    finally:
        _listens = False


@pytest.fixture
def outside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make files that a checkpoint might want, and go into a folder below them."""
    torch.save({"weight": torch.ones(2)}, workplace / f"{SECRET}.pt")
    save_file({"weight": torch.ones(2)}, workplace / f"{SECRET}.safetensors")
    (workplace / f"{SECRET}_net.py").write_text("open('ran', 'w').close()\nNet = None\n")
    inside = workplace / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    return workplace


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that `load` reads without leave."""
    return regraft.save(nn.Sequential(nn.Linear(4, 3)), tmp_path_factory.mktemp("small") / "small.safetensors")


def names(outside: Path) -> list[str]:
    absolute = outside / SECRET
    return [
        f"../{SECRET}.safetensors",
        f"{absolute}.safetensors",
        f"{absolute}.pt",
        f"file://{absolute}.pt",
        f"http://127.0.0.1:9/{SECRET}.pt",
        f"timm/../{SECRET}.pt",
        f"timm/resnet18.../../{SECRET}.pt",
        f"timm/local-dir:{outside}",
        f"timm/hf_hub:nobody/{SECRET}",
        f"py:../{SECRET}_net.py:Net",
        f"py:{SECRET}_net:Net",
        f"hf/nobody/{SECRET}",
    ]


def with_source(small: Path, target: Path, **source: Any) -> Path:
    def change(known: dict[str, Any]) -> dict[str, str]:
        known["card"]["recipe"]["source"] = {"name": "torch.nn", **source}
        return {"regraft": json.dumps(known)}

    write_with(small, target, change)
    return target


@pytest.mark.parametrize("index", range(12))
def test_load_opens_nothing_by_the_name_of_a_source(index: int, small: Path, outside: Path) -> None:
    path = with_source(small, Path("named.safetensors"), name=names(outside)[index])
    with nothing_written(outside), listening() as opened, pytest.raises(InputError):
        regraft.load(path)
    assert not [name for name in opened if SECRET in name or "127.0.0.1" in name]


@pytest.mark.parametrize("index", range(12))
def test_load_takes_the_name_of_weights_for_information(index: int, small: Path, outside: Path) -> None:
    path = with_source(
        small, Path("named.safetensors"), weights=names(outside)[index], layers="Sequential(Linear(4, 3))"
    )
    with nothing_written(outside), listening() as opened:
        assert torch.equal(regraft.load(path)[0].weight, regraft.load(small)[0].weight)
    assert not [name for name in opened if SECRET in name or "127.0.0.1" in name]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "a/../../secret.safetensors", "..", "link.safetensors"]
)
def test_load_weights_follows_an_index_to_files_beside_it_alone(name: str, outside: Path) -> None:
    Path("link.safetensors").symlink_to(outside / f"{SECRET}.safetensors")
    index = Path("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"weight": name}}))
    for read in (lambda: regraft.load_weights(nn.Linear(2, 1), index), lambda: regraft.diff(index, index)):
        with nothing_written(outside), listening() as opened, pytest.raises(InputError):
            read()
        assert not [name for name in opened if f"{SECRET}.safetensors" in name]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "..", "a\\b", ""])
def test_load_follows_a_delta_to_a_file_beside_it_alone(name: str, small: Path, outside: Path) -> None:
    base = {"kind": "file", "name": name, "digest": "0" * 64}
    write_with(small, Path("delta.safetensors"), document(base=base, whole="0" * 64))
    with nothing_written(outside), listening() as opened, pytest.raises(InputError, match="does not fit the format"):
        regraft.load("delta.safetensors")
    assert not [name for name in opened if SECRET in name]


@pytest.mark.parametrize("where", ["header", "card", "recipe", "metadata"])
def test_load_takes_from_no_file_the_leave_to_import(where: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(known: dict[str, Any]) -> dict[str, str]:
        place = {
            "header": known,
            "card": known["card"],
            "recipe": known["card"]["recipe"],
            "metadata": known["metadata"],
        }
        place[where] |= {"trust_code": True, "trust-code": True}
        return {"regraft": json.dumps(known)}

    write_with(saved, Path("trusting.safetensors"), change)
    monkeypatch.setattr("regraft.zoo._import_file", lambda *_: pytest.fail("imported"))
    with pytest.raises(TrustError):
        regraft.load("trusting.safetensors")


@pytest.mark.parametrize("line", ["trust_code = true", "[freeze]\ntrust_code = true"])
def test_read_plan_and_build_plan_take_no_leave_from_a_plan(
    line: str, tiny_net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regraft.zoo._import_file", lambda *_: pytest.fail("imported"))
    Path("plan.toml").write_text(f"source = {json.dumps(tiny_net)}\n{line}\n")
    with pytest.raises(ConfigError, match="trust_code"):
        read_plan("plan.toml")
    with pytest.raises(TrustError):
        build_plan(Plan(source=tiny_net, weights="none"))
    with pytest.raises(TrustError):
        build_plan(Plan(source=f"py('{tiny_net.removeprefix('py:')}')"))


@pytest.mark.parametrize("key", ["../victim", "/victim", "a/b", "..", "", "."])
def test_store_takes_plain_names_alone_as_keys(key: str, workplace: Path) -> None:
    store = Store(workplace / "cache")
    (workplace / "cache").mkdir()
    (workplace / "victim").mkdir()
    (workplace / "victim" / "entry.json").write_text("damaged")
    with nothing_written():
        for use in (store.find, store.write):
            with pytest.raises(ValueError, match="plain name"):
                use(key)


@pytest.mark.parametrize(
    "change",
    [
        {"dtypes": ["load"]},
        {"dtypes": ["nn"]},
        {"shapes": [[2**40, 3]]},
        {"shapes": [[-1, 3]]},
        {"shapes": [["2", 3]]},
        {"stretches": [[2**62]]},
        {"checksums": []},
        {"note": 5},
    ],
    ids=str,
)
def test_store_takes_an_entry_that_lies_for_none(change: dict[str, Any], workplace: Path) -> None:
    store = Store(workplace / "cache")
    writing = store.write("key")
    writing.append([torch.ones(2, 3)])
    writing.finish({})
    assert store.find("key") is not None
    file = workplace / "cache" / "key" / "entry.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert store.find("key") is None


def test_store_clear_follows_no_link(workplace: Path) -> None:
    store = Store(workplace / "cache")
    store.write("key").finish({})
    victim = workplace / "victim"
    victim.mkdir()
    (victim / "entry.json").write_text("{}")
    (workplace / "cache" / "link").symlink_to(victim)
    store.clear()
    assert (victim / "entry.json").exists()
    assert not (workplace / "cache" / "key").exists()
