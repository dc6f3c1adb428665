"""The ways of training: what they freeze, and the commands that say the same."""

import shlex

import pytest
from torchvision import models

import regraft
import tiny
from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import ConfigError
from regraft.train_options import list_options
from regraft.training.config import TrainConfig, make_config
from regraft.trials.ways import SCRATCH_FACTOR, WAYS, LayerSplit, commands, epochs_for, stage_config, ways_named

FLAGS = {flag: entry for entry in list_options() for flag in entry.flags.split("/")}


def parsed(command: str) -> dict[str, object]:
    """Read a command of `regraft train` as the command line does."""
    words, options = shlex.split(command)[3:], {}
    while words:
        flag = words.pop(0)
        if flag == "--trust-code":
            continue
        entry = FLAGS[flag]
        if entry.type is bool:
            options[entry.name] = not flag.startswith("--no-") and flag != "--exact"
        elif entry.default == ():
            options[entry.name] = (*options.get(entry.name, ()), words.pop(0))
        else:
            options[entry.name] = words.pop(0)
    return options


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_commands_stand_for_the_options_of_each_run(way) -> None:
    config = TrainConfig(weights="w.pth", accept="likely", image_size=64, fast=False, cache=False, batch_size=8)
    stages = way.stages_of(LayerSplit("layer2", ("type:BatchNorm2d",)), 12)
    if way.name == "advised":
        stages = ({"freeze_until": "layer2", "epochs": 12},)
    lines = commands(stages, config, "py:net.py:Net", "my photos", way.name)
    assert len(lines) == len(stages)
    for number, (line, stage) in enumerate(zip(lines, stages, strict=True)):
        expected = stage_config(config, stage, seed=0).model_dump(exclude_unset=True)
        options = parsed(line)
        start = "py:net.py:Net" if number == 0 else f"runs/{way.name}-{number}"
        assert options.pop("model") == start
        assert options.pop("out") == f"runs/{way.name}" + (f"-{number + 1}" if len(stages) > 1 else "")
        if number:
            expected = {name: value for name, value in expected.items() if name not in ("weights", "accept")}
        expected = {name: value for name, value in expected.items() if name not in ("seed", "validate_every")}
        assert make_config(options).model_dump(exclude_unset=True) == expected
        assert shlex.split(line)[2] == "my photos"
        assert "--trust-code" in line


def test_ways_make_the_same_number_of_passes_but_for_scratch() -> None:
    for epochs in (3, 4, 25, 50):
        for way in WAYS:
            stages = way.stages_of(LayerSplit("layer2", ()), epochs)
            expected = SCRATCH_FACTOR * epochs if way.name == "scratch" else epochs
            assert sum(stage["epochs"] for stage in stages) == expected
            assert all(stage["epochs"] >= 1 for stage in stages)


def test_ways_named_are_in_their_order_and_known() -> None:
    assert [way.name for way in ways_named(["all", "scratch", "all"])] == ["scratch", "all"]
    with pytest.raises(ConfigError, match=r"no way of training 'lpft'. Nearest: 'lp-ft'. Known: scratch, probe, "):
        ways_named(["lpft"])


def test_epochs_for_a_few_images_give_fifty_steps() -> None:
    assert [epochs_for(count, TrainConfig(batch_size=8)) for count in (2, 8, 9, 400)] == [50, 50, 25, 25]


def test_layer_split_cuts_a_network_in_the_middle_of_its_blocks() -> None:
    facts = ModelFacts(models.resnet18())
    layers = LayerSplit.of(facts)
    assert layers == LayerSplit("layer2.1", ("type:BatchNorm2d",))
    model = facts.model
    regraft.freeze(model, *layers.norms, until=layers.middle)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"layer3", "layer4", "fc"}
    assert LayerSplit.of(ModelFacts(tiny.PlainCnn())).norms == ("type:BatchNorm2d",)
