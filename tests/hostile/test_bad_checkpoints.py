"""Files that are no checkpoint, or a damaged one: every reader says so, and none of them runs code."""

import contextlib
import json
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import regraft
from hostile.crafted import document, write_with
from regraft.card import Recipe, Source
from regraft.checkpoint import Header, read_header
from regraft.checkpoint.file.digest import tensor_digest
from regraft.checkpoint.rebuilding import rebuild
from regraft.errors import CheckpointError, DataError, InputError, ModelError
from scene import nothing_written


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@contextlib.contextmanager
def taking_at_most(limit_bytes: int) -> Iterator[None]:
    """Check how much more memory the block had at any moment than there was before."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from /proc")
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    yield
    assert resident_bytes("VmHWM") - before < limit_bytes


def small(folder: Path, **fields: Any) -> Path:
    """Write a checkpoint of one layer with another header document."""
    saved = regraft.save(nn.Sequential(nn.Linear(4, 3)), folder / "small.safetensors")
    write_with(saved, folder / "hostile.safetensors", document(**fields))
    return folder / "hostile.safetensors"


def of(layers: str | None = None, *, name: str = "torch.nn", steps: Any = (), **source: Any) -> dict[str, Any]:
    return {"source": {"name": name, "layers": layers, **source}, "steps": list(steps)}


def step(operation: str, **arguments: Any) -> dict[str, Any]:
    return {"operation": operation, "arguments": arguments}


LINEAR = "Sequential(Linear(4, 3))"
RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "a layer of 256 MB": (
        of("Sequential(Linear(8000, 8000))"),
        "does not match its own recipe at '0.weight': (3, 4) in",
    ),
    "a layer of exabytes": (
        of("Sequential(Linear(1000000000, 1000000000))"),
        "asks for 1,000,000,001,000,000,000 weights",
    ),
    "a network of gigabytes": (
        of(name="timm/vit_giant_patch14_dinov2"),
        "does not match its own recipe: it has nothing for '",
    ),
    "many steps": (of(LINEAR, steps=[step("append", layers=["ReLU()"])] * 65), "has more than 64 steps or 32 parts"),
    "many parts": (of(name="graft", parts=[of(LINEAR)] * 40), "has more than 64 steps or 32 parts"),
    "a wide head": (of(LINEAR, steps=[step("replace_head", new=2 * 10**7)]), "does not match its own recipe"),
    "an endless head": (of(LINEAR, steps=[step("replace_head", new=10**30)]), "cannot be applied: "),
    "repeats in repeats": (
        of(f"Sequential({'TransformerEncoder(' * 2}ReLU(){', 150)' * 2})"),
        "layers, and 20,000 are the most",
    ),
    "more layers than are built": (
        of("Sequential(timm.layers.CondConv2d(4, 4, 1, num_experts=1001))"),
        "asks for 1,001 layers, and 1,000 are the most",
    ),
    "a pattern": (of(LINEAR, steps=[step("replace", path="re:0", new="ReLU()")]), "by a regular expression"),
    "a path that is none": (of(LINEAR, steps=[step("remove", path=5)]), "cannot be applied: "),
    "a graft without heads": (
        of(name="graft", parts=[of(LINEAR)]),
        "cannot put its 1 networks together by graft: KeyEr",
    ),
    "an unknown join": (of(name="weld", parts=[of(LINEAR)]), "puts networks together by 'weld', expected stitch or gr"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_load_refuses_a_hostile_recipe(case: str, workplace: Path) -> None:
    recipe, message = RECIPES[case]
    path = small(workplace, card={"recipe": recipe})
    started = time.monotonic()
    with nothing_written(), taking_at_most(256 * 2**20), pytest.raises(InputError) as caught:
        regraft.load(path)
    assert message in str(caught.value)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": {"0.weight": "0.bias"}}, "it says that '0.weight' is '0.bias'"),
        ({"shared": {"x": "y"}}, "it says that 'x' is 'y'"),
        ({"digests": {}}, "it has no digest of '"),
        ({"metadata": json.loads("[" * 90 + "]" * 90)}, "does not fit the format 1.0"),
    ],
)
def test_load_refuses_a_document_that_lies(fields: dict[str, Any], message: str, workplace: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        regraft.load(small(workplace, **fields))


def test_load_refuses_weights_of_another_kind_of_number(workplace: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    regraft.save(model, "small.safetensors")
    state = {name: tensor.detach().to(torch.int32) for name, tensor in model.state_dict().items()}
    card = read_header(Path("small.safetensors")).card
    digests = {name: tensor_digest(tensor) for name, tensor in state.items()}
    save_file(state, "cast.safetensors", {"regraft": Header(card=card, digests=digests).model_dump_json()})
    with pytest.raises(CheckpointError, match=r"at '0\.\w+': torch.int32 in the file, torch.float32 in the model"):
        regraft.load("cast.safetensors")


def test_load_takes_little_memory_for_what_was_cut_off_a_large_network(workplace: Path) -> None:
    wide = rebuild(
        Recipe(source=Source(layers="Sequential(Linear(8, 4), Linear(4, 13000000))", name="torch.nn"))
    )  # 260 MB
    cut = regraft.truncate(wide, drop=1)
    regraft.save(cut, "cut.safetensors")
    x = torch.randn(2, 8)
    expected = cut(x)
    del wide, cut
    with taking_at_most(200 * 2**20):
        loaded = regraft.load("cut.safetensors")
    assert torch.equal(loaded(x), expected)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_load_reads_a_newer_minor_format(saved: Path) -> None:
    write_with(saved, Path("newer.safetensors"), document(format="1.9", something_new={"a": 1}))
    known, newer = (regraft.load(path, trust_code=True).state_dict() for path in (saved, "newer.safetensors"))
    assert all(torch.equal(tensor, newer[name]) for name, tensor in known.items())


def test_load_notices_a_class_that_changed_since(saved: Path, net_file: Path, workplace: Path) -> None:
    other = workplace / "tiny_net.py"
    other.write_text(net_file.read_text().replace("nn.Conv2d(3, 8,", "nn.Conv2d(3, 9,").replace("(8", "(9"))
    shutil.copy(saved, "moved.safetensors")
    raw = saved.read_bytes().replace(str(net_file).encode(), str(other).encode())
    head = json.loads(saved.read_bytes()[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    text = head["__metadata__"]["regraft"].replace(str(net_file), str(other))
    write_with(saved, Path("moved.safetensors"), lambda _: {"regraft": text})
    with pytest.raises(
        CheckpointError, match=r"does not match its own recipe at 'conv.weight': \(8, 3, 3, 3\) in the f"
    ):
        regraft.load("moved.safetensors", trust_code=True)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"there are no images\. Give paths, PIL images, or a tensor \(N, C, H, W\)"),
        (5, r"a int is no image\. Give paths, PIL images, or a tensor"),
        (torch.zeros(3, 32, 32), r"the images have the shape \(3, 32, 32\), expected \(N, C, H, W\)"),
        ("no.jpg", r"no file or folder 'no.jpg' \(looked from "),
    ],
    ids=["none", "a number", "one tensor", "missing"],
)
def test_predict_refuses_what_is_no_image(images: Any, message: str, saved: Path) -> None:
    with pytest.raises(DataError, match=message):
        regraft.predict(regraft.load(saved, trust_code=True), images)


def test_predict_takes_open_images_and_paths_in_order(saved: Path, photos: Path, workplace: Path) -> None:
    model = regraft.load(saved, trust_code=True)
    paths = [photos / "cats" / "1.png", photos / "dogs" / "1.png", photos / "cats" / "2.png"]
    (workplace / "bad.jpg").write_text("no photo")
    mixed = [paths[0], workplace / "bad.jpg", Image.open(paths[1]), paths[2]]
    expected = [regraft.predict(model, path)[0] for path in paths]
    found = regraft.predict(model, mixed)
    assert [one.path for one in found] == [paths[0], None, paths[2]]
    assert [one.label for one in found] == [one.label for one in expected]
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=1e-6)


def test_predict_names_an_open_image_that_is_cut_off_by_its_place(saved: Path, photos: Path, workplace: Path) -> None:
    model = regraft.load(saved, trust_code=True)
    whole = (photos / "cats" / "1.png").read_bytes()
    (workplace / "half.png").write_bytes(whole[: len(whole) // 2])
    with (
        Image.open(workplace / "half.png") as image,
        pytest.raises(DataError, match=r"image 1 cannot be read: .*truncated.*leave it out"),
    ):
        regraft.predict(model, [Image.open(photos / "cats" / "1.png"), image])


def test_predict_and_evaluate_refuse_a_model_that_was_never_trained(tiny_net: str, photos: Path) -> None:
    model = regraft.create_model(tiny_net, weights="none", trust_code=True)
    for ask in (regraft.predict, regraft.evaluate):
        with pytest.raises(ModelError, match=r"this TinyNet does not know its classes\. Name them when you save it"):
            ask(model, photos)
