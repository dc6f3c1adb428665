"""One valid call of every public name, whose arguments can be exchanged one by one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regraft
from scene import TINY_NET, write_folder

Make = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """A function with a factory for each of its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Make]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def batches() -> Any:
    one = (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))
    return [one, one], [one]


def const(value: Any) -> Make:
    return lambda: value


def inputs() -> torch.Tensor:
    return torch.zeros(2, 4)


class Scene:
    """Files that valid calls read, and one result of a training run."""

    def __init__(self, folder: Path) -> None:
        self.net = folder / "tiny_net.py"
        self.net.write_text(TINY_NET)
        self.photos = write_folder(folder / "photos", count=3)
        self.tiny = f"py:{self.net}:TinyNet"
        self.saved = regraft.save(network(), folder / "saved.safetensors")
        changed = regraft.load(self.saved)
        with torch.no_grad():
            changed.get_parameter("4.weight").add_(1)
        self.delta = regraft.save(changed, folder / "delta.safetensors", base=self.saved)
        self.state_dict = folder / "state.pth"
        torch.save(network().state_dict(), self.state_dict)
        self.plan = folder / "plan.toml"
        self.plan.write_text('source = "Sequential(Linear(4, 3), ReLU())"\n')
        self.result = regraft.fit(network(), batches(), epochs=1)
        self.classifier = regraft.fit(
            self.tiny, self.photos, weights="none", trust_code=True, epochs=1, batch_size=4
        ).model

    def model_and_optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        regraft.freeze(model, "0", "2")
        return model, regraft.build_optimizer("sgd", model, lr=0.1)


def calls(scene: Scene) -> list[Call]:
    layers = {"model": network, "inputs": inputs}
    return [
        _Positional("append", layers, layer=lambda: nn.Linear(3, 2)),
        _Positional("freeze", layers, pattern=const("0"), until=const("2")),
        _Positional("unfreeze", layers, pattern=const("0"), since=const("2")),
        _Positional("select", {"model": network}, pattern=const("0")),
        _named("audit", model=network, optimizer=const(None)),
        _named(
            "build_optimizer",
            name_or_class=const("adamw"),
            model=network,
            lr=const(0.1),
            weight_decay=const(0.0),
            layer_decay=const(0.5),
            backbone_lr=const(None),
            betas=const((0.9, 0.999)),
            foreach=const(None),
        ),
        _named(
            "param_groups",
            model=network,
            lr=const(0.1),
            weight_decay=const(0.1),
            layer_decay=const(None),
            backbone_lr=const(0.01),
            no_decay=const(("bias",)),
        ),
        _named(
            "create_model", name=const(scene.tiny), weights=const("none"), num_classes=const(3), trust_code=const(True)
        ),
        _named("list_models", pattern=const("resnet1*")),
        _named("diff", a=network, b=const(scene.saved)),
        _named("load", path=const(scene.delta), base=const(scene.saved), device=const("cpu"), trust_code=const(False)),
        _named(
            "load_weights",
            model=network,
            path=const(scene.state_dict),
            rename=const({"^9": "0"}),
            match=const("names"),
            entry=const(None),
            accept=const("certain"),
            adapt=const(("stem",)),
            min_share=const(0.5),
            strict=const(False),
            dry_run=const(False),
        ),
        _named(
            "convert",
            path=const(scene.state_dict),
            out=const("new.safetensors"),
            model=const(None),
            rename=const(None),
            match=const("names"),
            entry=const(None),
            accept=const("certain"),
            tensors_only=const(False),
            trust_code=const(False),
            dry_run=const(False),
        ),
        _named(
            "merge", path=const(scene.delta), out=const("new.safetensors"), base=const(None), shard_bytes=const(10**6)
        ),
        _named(
            "save",
            model=network,
            path=const("new.safetensors"),
            base=const(None),
            metadata=const({"a": 1}),
            shard_bytes=const(10**6),
        ),
        _named("read_plan", path=const(scene.plan)),
        _named("build_plan", plan=lambda: regraft.read_plan(scene.plan), trust_code=const(False)),
        _named("plan_of", model=lambda: regraft.load(scene.saved)),
        _named("partition", model=lambda: scene.model_and_optimizer()[0], example=inputs),
        _named("summary", model=network, input_size=const((1, 4)), depth=const(1)),
        _named("summary", model=network, inputs=inputs),
        _named("to_source", model=network, class_name=const("Net"), inputs=inputs),
        _named("truncate", model=network, after=const("2"), drop_skips=const(False), inputs=inputs),
        _named("truncate", model=network, drop=const(1), inputs=inputs),
        _named("insert", model=network, new=nn.ReLU, after=const("2"), inputs=inputs),
        _named("insert", model=network, new=nn.ReLU, before=const("2"), inputs=inputs),
        _named("remove", model=network, path=const("1"), inputs=inputs),
        _named("replace", model=network, path=const("1"), new=nn.GELU, keep_weights=const(True), inputs=inputs),
        _named("replace_head", model=network, new=const(5), path=const("4"), keep=const({0: 0}), inputs=inputs),
        _named("replace_head", model=lambda: scene.classifier, new=const(3), keep=const({"cats": 1})),
        _named(
            "replace_stem",
            model=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            channels=const(4),
            inputs=lambda: torch.zeros(1, 4, 8, 8),
        ),
        _named(
            "stitch",
            front=network,
            back=network,
            cut=const(("1", "1")),
            adapter=const("auto"),
            batches=lambda: [torch.zeros(2, 4)],
            inputs=inputs,
        ),
        _named(
            "graft", parts=lambda: {"a": network(), "b": network()}, heads=const({"one": 2, "two": 3}), inputs=inputs
        ),
        _named("graft", parts=network, heads=const(2), inputs=inputs),
        _named("follow", **_follow(), lr=const(0.1), weight_decay=const(0.0), scheduler=const(None)),
        Call("freeze_state", _enter, {"model": network}),
        _named(
            "evaluate",
            model=lambda: scene.result.model,
            data=lambda: batches()[1],
            batch_size=const(4),
            device=const("cpu"),
            progress=regraft_progress,
        ),
        _named("evaluate", model=lambda: scene.classifier, data=const(scene.photos), batch_size=const(4)),
        _named("check", data=const(scene.photos), model=const(None), labels=const(False), progress=regraft_progress),
        _named(
            "advise",
            model=lambda: scene.classifier,
            data=const(scene.photos),
            budget=const(None),
            layers=const(None),
            progress=regraft_progress,
        ),
        _named(
            "compare",
            model=const(scene.tiny),
            data=const(scene.photos),
            images=const((1,)),
            seeds=const(1),
            ways=const(("scratch",)),
            trust_code=const(True),
            progress=regraft_progress,
            weights=const("none"),
            epochs=const(3),
        ),
        _named(
            "predict",
            model=lambda: scene.classifier,
            images=const(scene.photos),
            top=const(2),
            batch_size=const(4),
            device=const("cpu"),
            progress=regraft_progress,
        ),
        _named("predict", model=lambda: scene.classifier, images=lambda: torch.zeros(2, 3, 32, 32), top=const(2)),
        _named(
            "fit",
            model=network,
            data=batches,
            config=lambda: regraft.TrainConfig(),
            loss=const(None),
            overwrite=const(False),
            resume=const(False),
            trust_code=const(False),
            progress=regraft_progress,
            epochs=const(1),
            lr=const(0.1),
            optimizer=const("sgd"),
            device=const("cpu"),
            seed=const(0),
        ),
        _named(
            "fit",
            model=network,
            data=batches,
            out=const("run"),
            epochs=const(1),
            mixup=const(0.0),
            freeze=const(()),
            freeze_until=const(None),
            unfreeze=const(None),
            weight_decay=const(0.0),
            precision=const("fp32"),
            cache=const(True),
        ),
        _named(
            "fit",
            model=const(scene.tiny),
            data=const(scene.photos),
            weights=const("none"),
            trust_code=const(True),
            epochs=const(1),
            image_size=const(None),
            validation_share=const(0.4),
        ),
        _named("write_report", result=lambda: scene.result, path=const("report.html")),
        _of("Schedule.parse", regraft.Schedule.parse, text=const("head:1,all:1")),
        _of("Schedule.start", lambda model: regraft.Schedule.parse("head:1,all:1").start(model), model=network),
        Call(
            "Schedule.advance",
            _advance,
            {
                "epoch": const(2),
                "model": network,
                "optimizer": optimizer,
                "scheduler": const(None),
                "lr": const(0.1),
                "weight_decay": const(0.0),
                "layer_decay": const(None),
                "backbone_lr": const(None),
                "no_decay": const(("bias",)),
            },
        ),
        _of(
            "TrainConfig",
            regraft.TrainConfig,
            **{name: const(field.default) for name, field in regraft.TrainConfig.model_fields.items()},
        ),
        _of("TrainConfig.updated", lambda **o: regraft.TrainConfig().updated(**o), lr=const(0.1), freeze=const(("0",))),
        _of(
            "Preprocessing",
            regraft.Preprocessing,
            size=const(8),
            resize=const(8),
            mean=const((0.5,)),
            std=const((0.5,)),
            interpolation=const("bilinear"),
        ),
        _of("Plan", regraft.Plan, source=const("resnet18"), weights=const("none"), edits=const(()), freeze=const({})),
        _of(
            "Card",
            regraft.Card,
            recipe=const(None),
            preprocessing=const(None),
            task=const(None),
            classes=const(None),
            metrics=const({}),
        ),
        _of("Metrics.is_better_than", lambda other: scene.result.validation.is_better_than(other), other=const(None)),
    ]


def regraft_progress() -> Any:
    from regraft.progress import SILENT

    return SILENT


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def _named(name: str, /, **arguments: Make) -> Call:
    return Call(name, getattr(regraft, name), arguments)


def _of(name: str, function: Callable[..., Any], /, **arguments: Make) -> Call:
    return Call(name, function, arguments)


def _Positional(name: str, first: Mapping[str, Make], **arguments: Make) -> Call:
    word = next(iter(arguments))

    def call(model: Any, **rest: Any) -> Any:
        return getattr(regraft, name)(model, rest.pop(word), **rest)

    return Call(name, call, {**first, **arguments})


def _follow() -> dict[str, Make]:
    before = network()
    return {
        "optimizer": lambda: torch.optim.SGD(before.parameters(), lr=0.1),
        "before": lambda: before,
        "after": lambda: nn.Sequential(*before[:4], nn.Linear(6, 2)),
    }


def _enter(model: Any) -> None:
    with regraft.freeze_state(model):
        pass


def _advance(**arguments: Any) -> Any:
    return regraft.Schedule.parse("head:1,all:1").advance(**arguments)
