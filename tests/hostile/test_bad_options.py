"""Options, configurations, output folders, names and losses that cannot work: said before anything is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import regraft
from regraft.errors import ConfigError, DataError, LossError, ModelError, SelectionError, TrustError
from scene import Cli, Fit, Recorder, listing, nothing_written

VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epochs": 0}, ConfigError, r"'epochs' cannot be 0: input should be greater than or equal to 1"),
    ({"batch_size": 0}, ConfigError, r"'batch_size' cannot be 0: input should be greater than or equal to 1"),
    ({"epochs": "many"}, ConfigError, r"'epochs' cannot be 'many': input should be a valid integer"),
    ({"lr": 0}, ConfigError, r"'lr' cannot be 0: input should be greater than 0"),
    ({"lr": float("nan")}, ConfigError, r"'lr' cannot be nan"),
    ({"seed": 2**32}, ConfigError, r"'seed' cannot be 4294967296: input should be less than 4294967296"),
    ({"workers": -1}, ConfigError, r"'workers' cannot be -1"),
    ({"validation_share": 1.0}, ConfigError, r"'validation_share' cannot be 1.0: input should be less than 1"),
    ({"epoch": 1}, ConfigError, r"no option 'epoch'\. Nearest: 'epochs'"),
    ({"xyzzy": 1}, ConfigError, r"no option 'xyzzy'\. `regraft train --help` lists all"),
    ({"augment": "flop"}, ConfigError, r"'augment' cannot be 'flop': expected one of none, flip, standard, trivial"),
    ({"schedule": "cosin"}, ConfigError, r"'schedule' cannot be 'cosin': expected one of cosine, constant"),
    ({"precision": "fp8"}, ConfigError, r"'precision' cannot be 'fp8': expected one of auto, fp32, bf16, fp16"),
    ({"freeze": "conv"}, ConfigError, r"'freeze' cannot be 'conv': expected a list, as in \[\"layer1\", \"layer2\"\]"),
    ({"optimizer": "adamx"}, ConfigError, r"no optimizer 'adamx' in .*\. Nearest: 'adamax'"),
    ({"optimizer": "lbfgs"}, ConfigError, r"the optimizer 'lbfgs' needs a training loop"),
    ({"optimizer": "sparseadam"}, ConfigError, r"the optimizer 'sparseadam' needs .* such as adamw or sgd"),
    ({"optimizer": "adahessian"}, ConfigError, r"the optimizer 'adahessian' needs .* such as adamw or sgd"),
    ({"optimizer": "muon"}, ConfigError, r"torch's Muon trains matrices alone, .*Use timm/muon"),
    ({"optimizer": "fusedadam"}, ConfigError, r"the optimizer 'fusedadam' cannot be used here: .*Choose another"),
    ({"loss": "cross-entropi"}, ConfigError, r"no loss 'cross-entropi' for classification\. Nearest: 'cross-entropy'"),
    (
        {"loss": "mse"},
        ConfigError,
        r"no loss 'mse' for classification\. Choose from cross-entropy, focal, or py:FILE:name",
    ),
    ({"device": "quantum"}, ModelError, r"the device 'quantum' cannot be used: .*\. Try device='cpu'"),
    ({"device": "meta"}, ModelError, r"the device 'meta' cannot be used: .*\. Try device='cpu'"),
    (
        {"freeze": ("*",)},
        SelectionError,
        r"every parameter of TinyNet is frozen, .*Thaw some .*regraft\.unfreeze.*conv, norm, fc",
    ),
    (
        {"freeze": ("conv1",)},
        SelectionError,
        r"no layer 'conv1' in TinyNet\. Nearest: 'conv'.*`regraft inspect` lists all",
    ),
    ({"freeze": ("re:(",)}, SelectionError, r"'re:\(' is not a regular expression"),
    ({"freeze_until": "norn"}, SelectionError, r"no layer 'norn' in TinyNet\. Nearest: 'norm'"),
    ({"image_size": 1}, ModelError, r"TinyNet fails on a batch of shape \(4, 3, 1, 1\).*Give inputs of the shape"),
    ({"model": "resnet8"}, ModelError, r"no model 'resnet8'\. Nearest: 'resnet18'.*`regraft models` lists all"),
    ({"model": "efficientnet"}, ModelError, r"no model 'efficientnet'\. Nearest: .*`regraft models` lists all"),
    ({"model": "vit_tiny_patch16_224"}, ModelError, r"Did you mean 'timm/vit_tiny_patch16_224'\? `regraft models`"),
    ({"model": ""}, ModelError, r"the name is empty\. `regraft models` lists all"),
    ({"model": "py:tiny_net.py"}, ModelError, r"'py:tiny_net.py' is not of the form py:path/file.py:Name"),
    ({"model": "py:no.py:Net"}, ModelError, r"no file 'no.py' \(looked from "),
    ({"weights": "IMAGENET1K_V1"}, ModelError, r"has no registered weights 'IMAGENET1K_V1'\. Give a file, or 'none'"),
    ({"model": "resnet18", "weights": "V9"}, ModelError, r"no weights 'V9' for resnet18: .*IMAGENET1K_V1"),
    ({"weights": "no.pth"}, regraft.RegraftError, r"no file 'no.pth' \(looked from .*Give the path"),
    ({"trust_code": False}, TrustError, r"names Python code, which would run with your rights\. .*trust_code=True"),
]


@pytest.mark.parametrize(("options", "kind", "message"), VALUES, ids=lambda value: str(value)[:40])
def test_fit_refuses_a_value_that_cannot_work(
    options: dict[str, Any], kind: type[Exception], message: str, fit: Fit
) -> None:
    with nothing_written(), pytest.raises(kind, match=message) as caught:
        fit(out="run", **options)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"freeze": ("*",)},
        {"freeze": ("conv",), "loss": "no-such-loss"},
        {"freeze_until": "norm", "device": "quantum"},
        {"image_size": 64, "optimizer": "no-such-optimizer"},
    ],
    ids=str,
)
def test_fit_leaves_a_module_as_before_where_it_refuses(options: dict[str, Any], fit: Fit, tiny_net: str) -> None:
    model = regraft.create_model(tiny_net, weights="none", num_classes=2, trust_code=True)
    regraft.freeze(model, "norm")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])

    def state() -> list[object]:
        layers = [(len(layer._forward_pre_hooks), layer.training) for layer in model.modules()]
        return [*layers, *((p.requires_grad, id(p.grad)) for p in model.parameters()), model.regraft_card]

    before = state()
    with pytest.raises(regraft.RegraftError):
        fit((TensorDataset(*batch), TensorDataset(*batch)), model=model, **options)
    assert state() == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, r"data is a int, expected a folder, a \.csv table, or a pair"),
        ((1, 2), r"a int is no data\. Expected a Dataset, a DataLoader, or a list of batches"),
        (([], []), r"the training data is empty\. Give at least one batch"),
        (([1], [1]), r"the training data yields int, expected pairs \(inputs, targets\) of tensors"),
    ],
    ids=str,
)
def test_fit_refuses_data_of_the_wrong_kind(data: Any, message: str, fit: Fit, tiny_net: str) -> None:
    model = regraft.create_model(tiny_net, weights="none", trust_code=True)
    with nothing_written(), pytest.raises(DataError, match=message):
        fit(data, model=model, out="run")


def test_fit_does_not_keep_weights_that_explode_in_the_last_step_of_an_epoch(fit: Fit) -> None:
    with (
        nothing_written(),
        pytest.raises(LossError, match=r"epoch 1: the validation loss is nan \(learning rate 1e\+30\)"),
    ):
        fit(lr=1e30, batch_size=32, out="run")


def test_fit_keeps_the_best_epoch_where_a_loss_turns_nan(fit: Fit) -> None:
    steps = 0

    def explode(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        factor = float("nan") if steps == 1 + 3 + 2 else 1.0  # one trial, three steps an epoch, the second of epoch 2
        return torch.nn.functional.cross_entropy(outputs, targets) * factor

    told = Recorder()
    message = (
        r"epoch 2: the loss is nan at step 2 .*The best so far \(epoch 1, accuracy .*\) is kept in 'run/model\.saf"
    )
    with pytest.raises(LossError, match=message):
        fit(loss=explode, epochs=3, out="run", progress=told)
    assert {*listing(Path("run"))} == {"model.safetensors", "metrics.csv", "config.toml"}
    kept = regraft.evaluate(regraft.load("run/model.safetensors", trust_code=True), "photos")
    assert kept.count == 2  # those held out
    assert all(
        torch.isfinite(tensor).all()
        for tensor in regraft.load("run/model.safetensors", trust_code=True).state_dict().values()
    )


@pytest.mark.parametrize("out", ["taken", "taken/run", "taken/run/1"])
def test_fit_refuses_an_output_folder_inside_a_file_before_training(out: str, fit: Fit) -> None:
    Path("taken").write_text("mine")
    told = Recorder()
    with nothing_written(), pytest.raises(ConfigError, match=r"'taken' is a file, expected a folder .*out=FOLDER"):
        fit(out=out, progress=told)
    assert told.lines == []


def test_fit_leaves_old_results_until_the_first_new_checkpoint(fit: Fit, cli: Cli, train_words: list[object]) -> None:
    assert cli(*train_words, "--out", "run").exit_code == 0
    for options in ({"lr": 1e30}, {"freeze": ("*",)}, {"loss": "no-such-loss"}):
        with nothing_written(), pytest.raises(regraft.RegraftError):
            fit(out="run", overwrite=True, **options)


def test_fit_leaves_no_old_report_beside_new_results(fit: Fit, cli: Cli, train_words: list[object]) -> None:
    assert cli(*train_words, "--out", "run").exit_code == 0
    Path("run/thesis.txt").write_text("mine")
    old = listing(Path("run"))
    fit(out="run", overwrite=True, seed=1)
    new = listing(Path("run"))
    assert {*new} == {"model.safetensors", "metrics.csv", "config.toml", "thesis.txt"}
    assert new["thesis.txt"] == b"mine"
    assert all(new[name] != old[name] for name in new if name != "thesis.txt")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda state: {"x." + name + ".y": value for name, value in state.items()},
            ("nothing in 'w.pth' fits TinyNet",),
        ),
        (
            lambda state: {name: value for name, value in state.items() if not name.startswith("conv")},
            ("'w.pth' holds weights of another architecture", "it lacks 'conv.weight'", "Give the name of the network"),
        ),
        (
            lambda state: {**state, "conv.weight": torch.zeros(9, 3, 3, 3)},
            ("'w.pth' holds weights of another architecture", "it lacks 'conv.weight'"),
        ),
        (
            lambda state: {**state, "conv.bias": torch.zeros(8)},
            ("'w.pth' holds weights of another architecture", "it has 'conv.bias', which the model lacks"),
        ),
        (lambda state: [1, 2], ("'w.pth' holds no state dict, but [1, 2]",)),
    ],
    ids=["other names", "a layer less", "another width", "a tensor more", "no tensors"],
)
def test_fit_and_create_model_refuse_weights_of_another_architecture(
    change: Callable[[dict[str, torch.Tensor]], Any], parts: tuple[str, ...], fit: Fit, tiny_net: str
) -> None:
    state = regraft.create_model(tiny_net, weights="none", trust_code=True).state_dict()
    torch.save(change(state), "w.pth")
    with nothing_written(), pytest.raises(regraft.RegraftError) as caught:
        fit(weights="w.pth", out="run")
    for part in parts:
        assert part in str(caught.value)
