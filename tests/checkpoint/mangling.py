"""Mangled checkpoints: what happens to weights between the network that was trained and the file that people have.

Each case makes a file of a network whose tensors all differ in value, and says which tensor of the file belongs to
which of the model. It knows, because it did the mangling.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign_networks import (
    Block,
    Named,
    SmallResNet,
    hugging_face_vit,
    seeded,
    timm_name,
    timm_vit,
    torchvision_vit,
)
from safetensors.torch import save_file
from torch import nn

import tiny

State = dict[str, torch.Tensor]
Truth = dict[str, str]


@dataclass(frozen=True)
class Mangled:
    """One file and what is true of it.

    Attributes:
        model: The network to load into, with weights of its own.
        path: The file.
        truth: Name in the model → name in the file, of all tensors that belong to each other.
        values: Name in the model → the tensor that was trained.
        refused: Words of the error with which the file must be refused; empty where it must be read.
        adapted: Names whose values may differ, as they were made to fit.
        note: Words that the report must have.
    """

    model: nn.Module
    path: Path
    truth: Truth
    values: State
    refused: tuple[str, ...] = ()
    adapted: frozenset[str] = frozenset()
    note: str = ""


@dataclass
class Mangler:
    """A trained network, a fresh one, and a folder to write into."""

    folder: Path
    trained: nn.Module = field(default_factory=lambda: seeded(SmallResNet, 7))
    fresh: nn.Module = field(default_factory=lambda: seeded(SmallResNet, 1))

    @property
    def state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.trained.state_dict().items()}

    def rename(self, change: Callable[[str], str]) -> tuple[State, Truth]:
        names = {name: change(name) for name in self.state}
        return {names[name]: tensor for name, tensor in self.state.items()}, names

    def made(self, content: object, truth: Truth | None = None, **options: Any) -> Mangled:
        path = self.folder / "w.pth"
        legacy = options.pop("legacy", False)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return self.of(path, truth, **options)

    def of(self, path: Path, truth: Truth | None = None, **options: Any) -> Mangled:
        model = options.pop("model", self.fresh)
        values = options.pop("values", self.state)
        return Mangled(model, path, truth if truth is not None else {n: n for n in values}, values, **options)


def data_parallel(m: Mangler) -> Mangled:
    return m.made(*m.rename(lambda name: f"module.{name}"), note="prefix 'module.' stripped")


def compiled(m: Mangler) -> Mangled:
    return m.made(*m.rename(lambda name: f"_orig_mod.{name}"), note="prefix '_orig_mod.' stripped")


def lightning(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: f"model.{name}")
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}, "param_groups": []}],
        "lr_schedulers": [],
    }
    return m.made(content, truth, note="taken from the entry 'state_dict'; prefix 'model.' stripped")


def deepspeed(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: f"_forward_module.net.{name}")
    return m.made({"state_dict": state, "callbacks": {}}, truth, note="prefix '_forward_module.' stripped")


def infix(m: Mangler) -> Mangled:
    truth = {f"trunk.{name}": f"trunk.module.{name}" for name in m.state}
    model = nn.ModuleDict({"trunk": m.fresh, "top": nn.Linear(5, 2)})
    state = {f"trunk.module.{name}": tensor for name, tensor in m.state.items()}
    top = {"top.weight": torch.rand(2, 5), "top.bias": torch.rand(2)}
    values = {f"trunk.{name}": tensor for name, tensor in m.state.items()} | top
    return m.made(state | top, truth | {name: name for name in top}, model=model, values=values, note="'module.'")


def renamed_stages(m: Mangler) -> Mangled:
    return m.made(*m.rename(lambda name: name.replace("layer", "stage")))


def renamed_all(m: Mangler) -> Mangled:
    words = {"layer": "stage", "conv": "convolution", "bn": "norm", "fc": "classifier", "downsample": "shortcut"}

    def change(name: str) -> str:
        for before, after in words.items():
            name = name.replace(before, after)
        return name

    return m.made(*m.rename(change))


def new_parent(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: name if name.startswith("fc") else f"features.extractor.{name}")
    return m.made(state, truth)


def other_classes(m: Mangler) -> Mangled:
    state = m.state | {"fc.weight": torch.rand(9, 6), "fc.bias": torch.rand(9)}
    truth = {name: name for name in state if not name.startswith("fc.")}
    return m.made(state, truth, note="the head 'fc' is for 9 classes in the file and for 5 in the model")


def shuffled(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: f"module.{name}")
    return m.made(mixed(state), truth)


def shuffled_and_renamed(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: name.replace("layer", "stage"))
    return m.made(mixed(state), truth)


def missing_norm(m: Mangler) -> Mangled:
    state = {name: tensor for name, tensor in m.state.items() if ".bn2." not in name}
    return m.made(state, {name: name for name in state}, note="nothing for 16 tensors of the model")


def truncated(m: Mangler) -> Mangled:
    made = m.made(m.state, refused=("no whole zip file",))
    made.path.write_bytes(made.path.read_bytes()[:-2000])
    return made


def half(m: Mangler) -> Mangled:
    state = {name: tensor.half() for name, tensor in m.state.items()}
    return m.made(state, note="from float16 to float32", adapted=frozenset(state))


def bfloat16_legacy(m: Mangler) -> Mangled:
    state = {name: tensor.bfloat16() if tensor.ndim else tensor for name, tensor in m.state.items()}
    return m.made({"net": state}, legacy=True, note="from bfloat16 to float32", adapted=frozenset(state))


def two_networks(m: Mangler) -> Mangled:
    other = seeded(SmallResNet, 9).state_dict()
    content = {f"student.{name}": tensor for name, tensor in m.state.items()}
    content |= {f"teacher.{name}": tensor for name, tensor in other.items()}
    return m.made(content, {}, refused=("several parts of the file fit equally well", "'student.'", "'teacher.'"))


def two_entries(m: Mangler) -> Mangled:
    content = {"critic": tiny.build("plain").state_dict(), "actor": m.state}
    return m.made(content, note="taken from the entry 'actor'")


def torchvision_into_timm(m: Mangler) -> Mangled:
    trained = seeded(torchvision_vit, 3)
    values = {timm_name(name): tensor for name, tensor in trained.state_dict().items()}
    truth = {timm_name(name): name for name in trained.state_dict()}
    return m.made(trained.state_dict(), truth, model=timm_vit(seed=1), values=values)


def timm_into_torchvision(m: Mangler) -> Mangled:
    trained, model = seeded(timm_vit, 3), torchvision_vit(seed=1)
    truth = {name: timm_name(name) for name in model.state_dict()}
    values = {name: trained.state_dict()[source] for name, source in truth.items()}
    return m.made(trained.state_dict(), truth, model=model, values=values)


def nested(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: f"module._orig_mod.{name}")
    return m.made({"checkpoint": {"model": {"state_dict": state}, "step": 3}, "config": {"lr": 0.1}}, truth)


def average_beside(m: Mangler) -> Mangled:
    average = seeded(SmallResNet, 9).state_dict()
    return m.made({"state_dict": m.state, "state_dict_ema": average}, note="averaged weights, 'state_dict_ema'")


def average_in_names(m: Mangler) -> Mangled:
    average = {f"ema_model.{name}": tensor for name, tensor in seeded(SmallResNet, 9).state_dict().items()}
    state, truth = m.rename(lambda name: f"model.{name}")
    return m.made({"state_dict": average | state}, truth, note="averaged weights under 'ema_model.'")


def hugging_face(m: Mangler) -> Mangled:
    trained = seeded(lambda: Named(hugging_face_vit(prefix="vit.") | {"classifier.weight": (3, 8)}), 3).state_dict()
    model = seeded(lambda: Named(hugging_face_vit()), 1)
    truth = {name: f"vit.{name}" for name in model.state_dict()}
    values = {name: trained[source] for name, source in truth.items()}
    return m.made(trained, truth, model=model, values=values, note="prefix 'vit.' stripped")


def transposed(m: Mangler) -> Mangled:
    state = m.state | {"fc.weight": m.state["fc.weight"].T.contiguous()}
    truth = {name: name for name in state if name != "fc.weight"}
    return m.made(state, truth, note="1 tensors look transposed (fc.weight)")


def optimizer_beside(m: Mangler) -> Mangled:
    optimizer = torch.optim.Adam(m.trained.parameters())
    m.trained(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return m.made({"model": m.state, "optimizer": optimizer.state_dict(), "best": torch.tensor(0.5)})


def legacy(m: Mangler) -> Mangled:
    return m.made({"epoch": 1, "state_dict": m.state}, legacy=True)


def npz(m: Mangler) -> Mangled:
    np.savez(m.folder / "w.npz", **{name: tensor.numpy() for name, tensor in m.state.items()})
    return m.of(m.folder / "w.npz")


def torchscript(m: Mangler) -> Mangled:
    script = torch.jit.trace(m.trained.eval(), torch.rand(1, 3, 8, 8))
    torch.jit.save(script, m.folder / "w.pt")
    return m.of(m.folder / "w.pt", note="its code was not run")


def sharded(m: Mangler) -> Mangled:
    names = list(m.state)
    parts = {f"model-0000{k + 1}-of-00003.safetensors": names[k::3] for k in range(3)}
    for file, held in parts.items():
        save_file({name: m.state[name] for name in held}, m.folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, held in parts.items() for n in held}}
    (m.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return m.of(m.folder / "model.safetensors.index.json", note="read from 3 files")


def other_image_size(m: Mangler) -> Mangled:
    trained = seeded(lambda: timm_vit(32), 3).state_dict()
    options = {"model": timm_vit(16, seed=1), "values": trained, "adapted": frozenset({"pos_embed"})}
    return m.made(trained, note="positions resampled", **options)


def gray_stem(m: Mangler) -> Mangled:
    trained = seeded(lambda: SmallResNet(channels=1), 3).state_dict()
    options = {"values": trained, "adapted": frozenset({"conv1.weight"})}
    return m.made(trained, note="filters for 1 channels made to take 3", **options)


def extra_buffers(m: Mangler) -> Mangled:
    state, truth = m.rename(lambda name: f"module.{name}")
    extra = {
        "n_averaged": torch.tensor(8),
        "module.total_ops": torch.zeros(1),
        "module.layer1.total_ops": torch.ones(1),
    }
    return m.made(extra | state, truth, note="3 unexpected")


def swapped_blocks(m: Mangler) -> Mangled:
    """Two branches of the same shapes, of which neither names nor order tell which is which."""
    model = seeded(lambda: nn.ModuleDict({"left": Block(4, 4), "right": Block(4, 4)}), 1)
    state = seeded(lambda: nn.ModuleDict({"x": Block(4, 4), "y": Block(4, 4)}), 3).state_dict()
    truth = {name: name.replace("left.", "y.").replace("right.", "x.") for name in model.state_dict()}
    return m.made(state, truth, model=model, values={name: state[source] for name, source in truth.items()})


def counted_from_one(m: Mangler) -> Mangled:
    model = seeded(lambda: nn.ModuleDict({"blocks": nn.ModuleList(Block(4, 4) for _ in range(3))}), 1)
    trained = seeded(lambda: nn.ModuleDict({"blocks": nn.ModuleList(Block(4, 4) for _ in range(3))}), 3).state_dict()
    truth = {name: f"blocks.{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}" for name in trained}
    return m.made({truth[name]: tensor for name, tensor in trained.items()}, truth, model=model, values=trained)


def another_part_alike(m: Mangler) -> Mangled:
    """The file has a predictor, the model a projector, and both have the same shapes."""

    def network(part: str) -> nn.Module:
        return nn.ModuleDict({"trunk": Block(4, 6), part: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))})

    model = seeded(lambda: network("projector"), 1)
    state = seeded(lambda: network("predictor"), 3).state_dict()
    truth = {name: name for name in state if name.startswith("trunk.")}
    return m.made(state, truth, model=model, values=state)


def without_order(m: Mangler) -> Mangled:
    """safetensors keeps no order, and here the names are not those of the model."""
    state, truth = m.rename(lambda name: f"net.{name.replace('layer', 'stage')}")
    save_file(state, m.folder / "w.safetensors")
    return m.of(m.folder / "w.safetensors", truth)


def mixed(state: State) -> State:
    names = sorted(state)
    random.Random(3).shuffle(names)
    return {name: state[name] for name in names}


CASES: dict[str, Callable[[Mangler], Mangled]] = {
    make.__name__: make
    for make in (
        data_parallel,
        compiled,
        lightning,
        deepspeed,
        infix,
        renamed_stages,
        renamed_all,
        new_parent,
        other_classes,
        shuffled,
        shuffled_and_renamed,
        missing_norm,
        truncated,
        half,
        bfloat16_legacy,
        two_networks,
        two_entries,
        torchvision_into_timm,
        timm_into_torchvision,
        nested,
        average_beside,
        average_in_names,
        hugging_face,
        transposed,
        optimizer_beside,
        legacy,
        npz,
        torchscript,
        sharded,
        other_image_size,
        gray_stem,
        extra_buffers,
        swapped_blocks,
        counted_from_one,
        another_part_alike,
        without_order,
    )
}
