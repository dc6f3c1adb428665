"""The load doctor on names and shapes alone."""

import random
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from foreign_networks import SmallResNet, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from oracles import identical, same, snapshot
from regraft import load_weights
from regraft.checkpoint.matching.mapping import propose
from regraft.checkpoint.matching.naming import without_wrappers
from regraft.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


NET = shapes_of(SmallResNet())
WRAPPERS = ["module.", "_orig_mod.", "_forward_module.", "model.", "backbone.", "encoder.", "net.", "a.b.c."]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WRAPPERS), max_size=4), st.randoms(use_true_random=False), st.booleans())
def test_propose_is_certain_of_any_stack_of_prefixes_in_any_order(
    prefixes: list[str], order: random.Random, both: bool
) -> None:
    prefix = "".join(prefixes)
    names = list(NET)
    order.shuffle(names)
    theirs = {prefix + name: NET[name] for name in names}
    ours = {f"trunk.{name}": shape for name, shape in NET.items()} if both else NET
    found = propose(theirs, ours)
    assert {m.name: m.source for m in found.matches} == {("trunk." if both else "") + n: prefix + n for n in NET}
    assert {match.sure for match in found.matches} == {"certain"}


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(["shuffled", "renumbered"]))
def test_propose_is_never_certain_of_equal_blocks_under_new_numbers(order: list[int], how: str) -> None:
    """Blocks of equal shapes, which the file calls by other names in another order: nothing tells them apart."""
    block = {"weight": (4, 4), "bias": (4,), "norm.weight": (4,), "norm.bias": (4,)}
    ours = {f"blocks.{k}.{name}": shape for k in range(4) for name, shape in block.items()}
    letters = "pqrs" if how == "shuffled" else ["5", "6", "7", "8"]
    theirs = {f"blocks.{letters[k]}.{name}": shape for k in order for name, shape in block.items()}
    found = propose(theirs, ours)
    assert not any(match.sure == "certain" for match in found.matches)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(sorted(NET)), max_size=len(NET) - 1), st.randoms(use_true_random=False))
def test_propose_is_certain_of_no_wrong_pair_whatever_names_are_lost(lost: set[str], order: random.Random) -> None:
    """Some tensors are missing, and as many others with their shapes and other names are there."""
    names = [name for name in NET if name not in lost]
    strangers = {f"part{k}.{name.rpartition('.')[2]}": NET[name] for k, name in enumerate(sorted(lost))}
    theirs = {name: NET[name] for name in names} | strangers
    keys = list(theirs)
    order.shuffle(keys)
    found = propose({name: theirs[name] for name in keys}, NET)
    certain = {match.name: match.source for match in found.matches if match.sure == "certain"}
    assert all(name == source for name, source in certain.items())


def test_propose_doubts_rows_that_begin_with_other_numbers_where_a_shift_fits() -> None:
    """Five equal blocks in the file, counted from one, for four in the model, counted from zero."""
    theirs = {f"blocks.{k}.weight": (4, 4) for k in range(1, 6)}
    ours = {f"blocks.{k}.weight": (4, 4) for k in range(4)}
    found = {match.name: match for match in propose(theirs, ours).matches}
    assert {match.sure for match in found.values()} == {"guess"}
    assert "numbers begin at 1 in the file and at 0 in the model" in found["blocks.1.weight"].reason
    theirs |= {"blocks.1.weight": (4, 3)}  # now a shift does not fit, and equal names are what they seem
    found = {match.name: match for match in propose(theirs, ours).matches}
    assert found["blocks.2.weight"].sure == "certain"


def test_propose_gives_no_tensor_twice() -> None:
    theirs = {f"stage{k}.{name}": (4, 4) for k in range(3) for name in ("a.weight", "b.weight")}
    ours = {f"layer{k}.{name}": (4, 4) for k in range(5) for name in ("a.weight", "b.weight")}
    found = propose(theirs, ours)
    for names in ([match.name for match in found.matches], [match.source for match in found.matches]):
        assert max(Counter(names).values()) == 1


def test_propose_maps_the_same_network_of_two_libraries(tmp_path: Path) -> None:
    """resnet18 has the same names in timm and in torchvision; a vision transformer has none in common but `head`."""
    with torch.device("meta"):
        pairs = [
            (models.vit_b_16(), timm.create_model("vit_base_patch16_224"), "blocks.11.mlp.fc2.weight"),
            (models.vgg11_bn(), timm.create_model("vgg11_bn"), "features.25.weight"),
            (models.densenet121(), timm.create_model("densenet121"), "features.norm5.weight"),
            (models.convnext_tiny(), timm.create_model("convnext_tiny"), "stages.3.blocks.2.mlp.fc2.weight"),
        ]
    expected = {
        "blocks.11.mlp.fc2.weight": "encoder.layers.encoder_layer_11.mlp.3.weight",
        "features.25.weight": "features.25.weight",
        "features.norm5.weight": "features.norm5.weight",
        "stages.3.blocks.2.mlp.fc2.weight": "features.7.2.block.5.weight",
    }
    for theirs, ours, name in pairs:
        found = {match.name: match for match in propose(shapes_of(theirs), shapes_of(ours)).matches}
        assert found[name].source == expected[name]
        assert len(found) > 0.9 * len(shapes_of(ours))


def test_without_wrappers_takes_wrappers_off_without_a_model() -> None:
    names, notes = without_wrappers(["module._orig_mod.model.fc.weight", "module._orig_mod.model.fc.bias"])
    assert list(names.values()) == ["fc.weight", "fc.bias"]
    assert notes == ["prefix 'module.' stripped", "prefix '_orig_mod.' stripped", "prefix 'model.' stripped"]
    names, _ = without_wrappers(["model.fc.weight", "criterion.weight"])
    assert list(names.values()) == ["model.fc.weight", "criterion.weight"]
    names, _ = without_wrappers(["module.fc.weight", "fc.weight"])  # which would become one
    assert list(names.values()) == ["module.fc.weight", "fc.weight"]


def odd(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"t{index}": tensor for index, tensor in enumerate(state.values())}


def test_load_weights_fills_a_network_by_shapes_and_order_alone(tmp_path: Path) -> None:
    state = seeded(SmallResNet, 3).state_dict()
    torch.save(odd(state), tmp_path / "w.pth")
    model = seeded(SmallResNet, 1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"would be loaded|nothing in"):
        load_weights(model, tmp_path / "w.pth")
    assert same(before, snapshot(model))
    report = load_weights(model, tmp_path / "w.pth", match="shapes")
    for name, tensor in state.items():
        assert identical(model.state_dict()[name], tensor) or name.endswith("num_batches_tracked"), name
    assert {match.sure for match in report.matches} == {"likely"}
    assert "in the file  in the model" in str(report)


def test_load_weights_refuses_shapes_that_leave_a_choice(tmp_path: Path) -> None:
    torch.save({f"t{k}": torch.ones(4, 4) for k in range(3)}, tmp_path / "w.pth")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"'0.weight' of the model may be 't0' or 't1' of the file or another"):
        load_weights(model, tmp_path / "w.pth", match="shapes")
    torch.save({"t0": torch.ones(4, 4), "t1": torch.ones(3, 4)}, tmp_path / "w.pth")
    bigger = nn.Sequential(nn.Linear(7, 4, bias=False), nn.Linear(4, 3, bias=False))
    with pytest.raises(CheckpointError, match=r"'0.weight' of the model finds no layer in the file \(1 of 2"):
        load_weights(bigger, tmp_path / "w.pth", match="shapes")
    assert same(before, snapshot(model))


def test_load_weights_does_not_match_a_file_without_order_by_order(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(odd(seeded(SmallResNet, 3).state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="The file does not keep the order of layers"):
        load_weights(SmallResNet(), tmp_path / "w.safetensors", match="shapes")


def test_load_weights_report_is_json_and_a_table(tmp_path: Path) -> None:
    import json

    state = {f"module.{name.replace('layer', 'stage')}": t for name, t in seeded(SmallResNet, 3).state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {}}, tmp_path / "w.pth")
    model = SmallResNet()
    before = snapshot(model)
    report = load_weights(model, tmp_path / "w.pth", dry_run=True)
    assert same(before, snapshot(model))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["counts"] == {
        "loaded": 63, "missing": 0, "unexpected": 0, "mismatched": 0, "certain": 63, "likely": 0, "guess": 0,
    }  # fmt: skip
    assert found["left_out"] == ["epoch", "optimizer"]
    assert found["dry_run"] is True
    assert found["share"] == 1.0
    lines = str(report).splitlines()
    assert lines[0].startswith("63 tensors would be loaded from ")
    assert "left out: epoch, optimizer" in lines
    row = next(line for line in lines if line.startswith("module.stage1.0.conv1.weight"))
    assert row.split()[1:4] == ["layer1.0.conv1.weight", "4×4×3×3", "certain"]
    assert "'stage' is 'layer', and numbers, order and shapes agree" in row
