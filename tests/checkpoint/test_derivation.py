"""Networks that their own constructors made, and classes of one's own, load from the file that was saved of them."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

from checkpoint.altered import assert_equal, shake
from oracles import identical
from regraft import Preprocessing, fit, load, load_weights, save
from regraft.card import card_of
from regraft.checkpoint import read_header
from regraft.checkpoint.plan import build_plan, plan_of
from regraft.checkpoint.recipes.derivation import derive_recipe
from regraft.checkpoint.recipes.differences import differing_layers
from regraft.checkpoint.recipes.own_files import portable_recipe
from regraft.errors import CheckpointError, EditError, ModelError, TrustError
from regraft.progress import Progress

OWN = """
import torch
from torch import nn
import parts_of_it

class Net(nn.Module):
    def __init__(self, width=5, scale=1.0):
        super().__init__()
        self._scale = scale
        self.stem = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, parts_of_it.OUTPUTS)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3))) * self._scale

class Same(nn.Module):
    def forward(self, x):
        return x

class Wrapper(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, x):
        return self.inner(x)

def local():
    class Inner(Net):
        pass
    return Inner()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a user's file as a script beside it does."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own_networks.py").write_text(OWN)
    (folder / "parts_of_it.py").write_text("OUTPUTS = 3\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    for name in ("own_networks", "parts_of_it"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import own_networks

    return own_networks


def with_head(model: nn.Module, path: str, head: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, head)
    return model


def transformers_vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**width, image_size=32, num_labels=3, **options))


def transformers_bert() -> nn.Module:
    from transformers import AutoModelForSequenceClassification, BertConfig

    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=50, **width), attn_implementation="eager"
    )


def squeezenet_with_norm() -> nn.Module:
    return with_head(torchvision.models.squeezenet1_1(), "features.1", nn.BatchNorm2d(64, eps=0.3))


# Network, source of its recipe, arguments of the source, and layers that are replaced.
CONSTRUCTED: dict[str, tuple[Callable[[], nn.Module], str, set[str], list[str]]] = {
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=3), "resnet18", {"num_classes"}, []),
    "torchvision, a head by hand": (
        lambda: with_head(
            torchvision.models.mobilenet_v3_small(),
            "classifier",
            nn.Sequential(nn.Linear(576, 8), nn.Sequential(nn.ReLU(), nn.Dropout(0.4)), nn.Linear(8, 3)),
        ),
        "mobilenet_v3_small",
        set(),
        ["classifier"],
    ),
    "torchvision, a layer by hand": (squeezenet_with_norm, "squeezenet1_1", set(), ["features.1"]),
    "timm": (
        lambda: timm.create_model("test_vit", num_classes=3, drop_path_rate=0.1),
        "timm/test_vit",
        {"num_classes", "drop_path_rate"},
        [],
    ),
    "timm, another size": (lambda: timm.create_model("test_vit", img_size=64), "timm/test_vit", {"img_size"}, []),
    "timm, reset_classifier": (
        lambda: reset(timm.create_model("test_resnet")),
        "timm/test_resnet",
        {"num_classes"},
        [],
    ),
    "timm, a head by hand": (
        lambda: with_head(timm.create_model("test_resnet", in_chans=1), "fc", nn.Linear(96, 3)),
        "timm/test_resnet",
        {"in_chans"},
        ["fc"],
    ),
    "transformers": (transformers_vit, "transformers/ViTForImageClassification", {"config"}, []),
    "transformers, a head by hand": (
        lambda: with_head(transformers_vit(qkv_bias=False), "classifier", nn.Linear(16, 9)),
        "transformers/ViTForImageClassification",
        {"config"},
        ["classifier"],
    ),
    "transformers, text": (transformers_bert, "transformers/BertForSequenceClassification", {"config"}, []),
}


def reset(model: nn.Module) -> nn.Module:
    model.reset_classifier(3)
    return model


def inputs_for(model: nn.Module) -> torch.Tensor:
    if type(model).__name__.startswith("Bert"):
        return torch.arange(12).view(2, 6)
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return torch.randn(2, first.in_channels, *side_of(model))


def side_of(model: nn.Module) -> tuple[int, int]:
    patches = getattr(model, "patch_embed", None)
    return patches.img_size if patches is not None else (32, 32) if hasattr(model, "config") else (64, 64)


def answer(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        outputs = model.eval()(inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


@pytest.mark.parametrize(("make", "name", "arguments", "replaced"), CONSTRUCTED.values(), ids=list(CONSTRUCTED))
def test_derive_recipe_of_a_network_that_its_constructor_made(
    make: Callable[[], nn.Module], name: str, arguments: set[str], replaced: list[str], tmp_path: Path
) -> None:
    if name.startswith("transformers/"):
        pytest.importorskip("transformers")
    model = shake(make())
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert_equal(loaded, model)
    recipe = card_of(loaded).recipe
    assert recipe is not None
    assert (recipe.source.name, set(recipe.source.arguments)) == (name, arguments)
    assert [step.arguments["path"] for step in recipe.steps] == replaced
    inputs = inputs_for(model)
    assert identical(answer(loaded, inputs), answer(model, inputs))
    assert differing_layers(loaded, model) == {}
    assert card_of(model).recipe is None


def test_fit_writes_files_that_a_fresh_process_loads(own: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 3)
    small = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    networks = {
        "torchvision": (torchvision.models.mobilenet_v3_small(num_classes=3), data),
        "torchvision by hand": (with_head(torchvision.models.resnet18(), "fc", nn.Linear(512, 3)), data),
        "timm": (timm.create_model("test_resnet", num_classes=3, pretrained=False), data),
        "transformers": (transformers_vit(), small),
        "own": (own.Net(), data),
        "own by hand": (with_head(own.Net(), "head", nn.Linear(5, 4)), data),
    }
    expected, files = {}, {}
    for name, (model, samples) in networks.items():
        out = str(tmp_path / name)
        files[name] = str(fit(model, (samples, samples), out=out, epochs=1, batch_size=4, lr=0.01).checkpoint)
        expected[name] = answer(model, samples[:4][0]).tolist()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("own", "own by hand"):
        files[name] = str(Path(files[name]).rename(moved / f"{name}.safetensors"))
    for file in ("own_networks.py", "parts_of_it.py"):
        (tmp_path / "project" / file).rename(moved / file)
    torch.save((data[:4][0], small[:4][0]), tmp_path / "inputs.pt")
    code = f"""if True:
        import json, sys, torch, regraft
        data, small = torch.load({str(tmp_path / "inputs.pt")!r})
        answers = {{}}
        for name, path in json.loads(sys.argv[1]).items():
            model = regraft.load(path, trust_code="own" in name)
            with torch.no_grad():
                outputs = model(small if name == "transformers" else data)
            answers[name] = getattr(outputs, "logits", outputs).tolist()
        print(json.dumps(answers))
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, json.dumps(files)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == expected


def enclosed(own: ModuleType) -> nn.Module:
    model, factor = own.Net(), 2
    model.after = lambda x: x * factor
    return model


UNKNOWN: dict[str, tuple[Callable[[ModuleType], nn.Module], str]] = {
    "an argument that changes no layer": (
        lambda own: own.Net(scale=2.0),
        "its argument 'width' cannot be read back, as it has no attribute of that name. Keep it: self.width = width",
    ),
    "a function": (enclosed, "its argument 'width' cannot be read back"),
    "a network as argument": (lambda own: own.Wrapper(nn.Linear(2, 2)), "its argument 'network' cannot be read back"),
    "a class in a function": (lambda own: own.local(), "its class is defined inside of a function or another class"),
    "layers throughout": (
        lambda _: torchvision.models.resnet18(norm_layer=nn.InstanceNorm2d),
        "20 layers differ from those of resnet18, and 16 are the most",
    ),
    "features of timm": (
        lambda _: timm.create_model("test_resnet", features_only=True),
        "it is a FeatureListNet of timm, and no network with a name is of that class",
    ),
    "a setting of timm": (
        lambda _: timm.create_model("test_vit", num_classes=3, init_values=0.1, act_layer="relu"),
        "layers differ from those of timm/test_vit, and 16 are the most",
    ),
}


@pytest.mark.parametrize(("make", "reason"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_save_warns_where_no_recipe_rebuilds_a_network(
    make: Callable[[ModuleType], nn.Module], reason: str, own: ModuleType, tmp_path: Path
) -> None:
    model = shake(make(own))
    with pytest.warns(UserWarning, match="no recipe rebuilds this") as caught:
        path = save(model, tmp_path / "model.safetensors")
    message = str(caught[0].message)
    assert reason in message
    assert f"regraft.load will refuse '{path}'" in message
    assert "Load it with load_weights(model, path) into a network that your own code builds." in message
    with pytest.raises(CheckpointError, match="no recipe"):
        load(path, trust_code=True)
    assert load_weights(make(own), path, strict=True).missing == ()


def test_fit_warns_before_it_trains_where_its_file_will_not_load(own: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []

    class Order(Progress):
        def say(self, line: str) -> None:
            said.append(line.split()[0])

    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: said.append(str(message))
        fit(own.local(), (data, data), out=str(tmp_path / "run"), epochs=3, batch_size=4, progress=Order())
    assert [line.startswith("no recipe rebuilds this Inner") for line in said].index(True) < said.index("epoch")
    assert sum("no recipe" in line for line in said) == 1
    said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(own.local(), (data, data), epochs=1, batch_size=4)  # which writes nothing


def test_derive_recipe_takes_a_class_of_the_running_script_if_it_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = (
        "from torch import nn\nclass Small(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 2)\n"
    )
    for rest, reason in (
        ("if __name__ == '__main__':\n    model = Small()\n", None),
        ("model = Small()\n", "to import it would run the whole script again"),
        (None, "so that no file holds it"),
    ):
        script = ModuleType("__main__")
        exec(definition + (rest or ""), vars(script))
        if rest is not None:
            script.__file__ = str(tmp_path / "script.py")
            (tmp_path / "script.py").write_text(definition + rest)
        monkeypatch.setitem(sys.modules, "__main__", script)
        derivation = derive_recipe(script.Small())
        if reason is None:
            path = save(script.Small(), tmp_path / "model.safetensors")
            assert header_text(path).count("script.py:Small") == 1
            assert type(load(path, trust_code=True)) is script.Small  # without a second run of the script
        else:
            assert derivation.recipe is None
            assert reason in str(derivation.reason)


def header_text(path: Path) -> str:
    header = read_header(path)
    assert header is not None
    return header.model_dump_json()


def test_portable_recipe_names_files_without_the_folders_above(own: ModuleType, tmp_path: Path) -> None:
    project, out = tmp_path / "project", tmp_path / "project" / "runs" / "1"
    out.mkdir(parents=True)
    for network in (
        own.Net(),
        nn.Sequential(own.Same(), nn.ReLU()),
        with_head(own.Net(), "head", nn.Sequential(own.Same(), nn.Linear(5, 2))),
    ):
        recipe = derive_recipe(network).recipe
        assert recipe is not None
        for folder, name in (
            (project, "own_networks.py"),
            (out, "../../own_networks.py"),
            (tmp_path, "own_networks.py"),
        ):
            text = portable_recipe(recipe, folder).model_dump_json()
            assert f"{name}:Net" in text or f"{name}:Same" in text
            assert "own_networks:" not in text
            assert str(tmp_path) not in text


def test_load_says_where_it_searched_for_a_file_with_a_class(own: ModuleType, tmp_path: Path) -> None:
    path = save(own.Net(), tmp_path / "project" / "model.safetensors")
    moved = path.rename(tmp_path / "model.safetensors")
    with pytest.raises(TrustError, match=r"'py:own_networks\.py:Net' names Python code"):
        load(moved)
    assert type(load(moved, trust_code=True)) is own.Net  # from the working directory
    (tmp_path / "project" / "own_networks.py").rename(tmp_path / "project" / "other.py")
    with pytest.raises(
        ModelError, match=r"no file 'own_networks.py' with the class of the network; searched: "
    ) as caught:
        load(moved, trust_code=True)
    assert f"'{tmp_path / 'own_networks.py'}', '{tmp_path / 'project' / 'own_networks.py'}'" in str(caught.value)
    assert str(caught.value).endswith("Put it beside the checkpoint.")


def test_save_keeps_the_preprocessing_of_timms_own_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    preprocessing = card_of(load(save(model, tmp_path / "model.safetensors"))).preprocessing
    assert preprocessing is not None
    assert preprocessing.mean == (0.1, 0.2, 0.3)


def test_differing_layers_ignores_notes_on_a_network_of_a_library(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.names, model.preprocessing = ["a", "b"], {"size": 8, "resize": 9}
    loaded = load(save(model, tmp_path / "model.safetensors"))
    assert card_of(loaded).preprocessing == Preprocessing(size=8, resize=9)
    assert differing_layers(model, loaded) == {}
    model[0].forward = lambda x: x
    assert list(differing_layers(model, loaded)) == ["0"]
    del model[0].forward
    model[1].eps, model[1].momentum = 0.1, None
    assert differing_layers(model, loaded) == {"1": "its 'eps' is 0.1, and 1e-05 in a new one"}


def test_plan_of_a_network_that_was_built_with_arguments(tmp_path: Path) -> None:
    model = load(save(torchvision.models.squeezenet1_1(num_classes=3), tmp_path / "model.safetensors"))
    plan = plan_of(model)
    assert [str(step) for step in plan.edits] == ["replace_head(new=3)"]
    assert differing_layers(build_plan(plan), model) == {}
    model = load(save(timm.create_model("test_vit", img_size=64), tmp_path / "model.safetensors"))
    with pytest.raises(EditError, match="'timm/test_vit' was built with img_size, which no plan holds"):
        plan_of(model)
