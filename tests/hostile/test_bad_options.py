"""Options, configurations, output folders, names and losses that cannot work: said before anything is written."""

import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing
from scene import Recorder, assert_refused, listing, nothing_written, only_json
from torch.utils.data import TensorDataset

import regraft
from regraft.errors import ConfigError, DataError, LossError, ModelError, SelectionError, TrustError

Cli = Callable[..., typer.testing.Result]
Fit = Callable[..., regraft.FitResult]

VALUES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"epochs": 0}, ConfigError, r"the options: 'epochs' cannot be 0: input should be greater than or equal to 1"),
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
    ({"device": "quantum"}, ModelError, r"the device 'quantum' cannot be used: .*\. Try --device cpu"),
    ({"device": "meta"}, ModelError, r"the device 'meta' cannot be used: .*\. Try --device cpu"),
    (
        {"freeze": ("*",)},
        SelectionError,
        r"every parameter of TinyNet is frozen, .*Thaw some .*--unfreeze-all.*conv, norm, fc",
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
    ({"model": ""}, ModelError, r"no model ''\. `regraft models` lists all"),
    ({"model": "py:tiny_net.py"}, ModelError, r"'py:tiny_net.py' is not of the form py:path/file.py:Name"),
    ({"model": "py:no.py:Net"}, ModelError, r"no file 'no.py' \(looked from "),
    ({"weights": "IMAGENET1K_V1"}, ModelError, r"has no registered weights 'IMAGENET1K_V1'\. Give a file, or 'none'"),
    ({"model": "resnet18", "weights": "V9"}, ModelError, r"no weights 'V9' for resnet18: .*IMAGENET1K_V1"),
    ({"weights": "no.pth"}, regraft.RegraftError, r"no file 'no.pth' \(looked from .*Give the path"),
    ({"trust_code": False}, TrustError, r"names Python code, which would run with your rights\. .*--trust-code"),
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


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("vector", r"the loss returned a tensor of shape \(4,\), expected one number\. Reduce it"),
        ("number", r"the loss returned a float, expected a tensor with one number"),
        (
            "nan",
            r"epoch 1: the loss is nan at step 1 of this epoch \(learning rate .*\)\. Every layer.*Nothing was writ",
        ),
    ],
)
def test_fit_and_cli_train_stop_at_a_loss_that_is_no_finite_number(
    loss: str, message: str, net_file: Path, cli: Cli, fit: Fit, train_words: list[object]
) -> None:
    with nothing_written(), pytest.raises(LossError, match=message):
        fit(loss=f"py:{net_file}:{loss}", out="run")
    with nothing_written():
        assert cli(*train_words, "--loss", f"py:{net_file}:{loss}", "--out", "run").exit_code == 2


def test_cli_train_says_when_a_learning_rate_explodes_and_what_to_try(cli: Cli, train_words: list[object]) -> None:
    with nothing_written():
        result = cli(*train_words, "--lr", 1e30, "--out", "run")
        assert_refused(
            result,
            "epoch 1: the loss is nan at step 2 of this epoch (learning rate 1e+30)",
            "Try a tenth of the learning rate",
            "Nothing was written",
        )


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
    assert kept.count == 12
    assert all(
        torch.isfinite(tensor).all()
        for tensor in regraft.load("run/model.safetensors", trust_code=True).state_dict().values()
    )


def test_fit_and_cli_train_leave_a_used_output_folder_alone(fit: Fit, cli: Cli, train_words: list[object]) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    with nothing_written():
        assert_refused(cli(*train_words, "--out", "run"), "'run' exists and is not empty", "--out", "--overwrite")
    with nothing_written(), pytest.raises(ConfigError, match="exists and is not empty"):
        fit(out="run")


@pytest.mark.parametrize("out", ["taken", "taken/run", "taken/run/1"])
def test_fit_refuses_an_output_folder_inside_a_file_before_training(out: str, fit: Fit) -> None:
    Path("taken").write_text("mine")
    told = Recorder()
    with nothing_written(), pytest.raises(ConfigError, match=r"'taken' is a file, expected a folder .*--out"):
        fit(out=out, progress=told)
    assert told.lines == []


def test_fit_and_cli_refuse_a_name_too_long_for_a_folder_before_training(fit: Fit, cli: Cli) -> None:
    Path("taken").write_text("mine")
    with nothing_written(), pytest.raises(ConfigError, match=r"cannot be a folder for the results: .*Choose another"):
        fit(out="x" * 5000)
    with nothing_written():
        assert_refused(cli("train", "x" * 5000), "the data is 'xxx", "a name of more than 255 bytes")
        assert_refused(cli("train", "photos", "--config", "x" * 5000), "cannot be used as a path: File name too long")
        assert_refused(cli("demo", "--out", "taken/demo"), "cannot be used as a path: Not a directory")
        assert_refused(cli("inspect", "x" * 5000), "cannot be used as a path: File name too long")


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


def test_cli_train_reproduces_a_run_bit_for_bit_from_the_written_options(cli: Cli, train_words: list[object]) -> None:
    words = ("--epochs", 2, "--augment", "standard", "--seed", 3, "--freeze", "conv", "--lr", 0.01)
    assert cli(*train_words, *words, "--out", "first").exit_code == 0
    again = cli("train", "--config", "first/config.toml", "--trust-code", "--out", "second")
    assert again.exit_code == 0, again.stderr
    first, second = (regraft.load(f"{name}/model.safetensors", trust_code=True) for name in ("first", "second"))
    assert [name for name, parameter in first.named_parameters() if not parameter.requires_grad] == ["conv.weight"]
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert Path("first/config.toml").read_text().replace("first", "second") == Path("second/config.toml").read_text()


def test_cli_train_flags_win_over_the_configuration(cli: Cli, train_words: list[object]) -> None:
    Path("options.toml").write_text('epochs = 7\nseed = 5\nfreeze = ["conv"]\naugment = "none"\n')
    result = only_json(cli(*train_words, "--config", "options.toml", "--seed", 6, "--out", "run", "--json").stdout)
    assert len(result["epochs"]) == 1
    assert {name: result["config"][name] for name in ("seed", "freeze", "augment")} == {
        "seed": 6,
        "freeze": ["conv"],
        "augment": "none",
    }


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"epoch = 3", ("no option 'epoch'", "Nearest: 'epochs'")),
        (b"[train]\nepochs = 3", ("no option 'train'", "--help")),
        (b'epochs = "many"', ("'epochs' cannot be 'many'", "valid integer")),
        (b'freeze = "conv"', ("'freeze' cannot be 'conv'", 'expected a list, as in ["layer1"')),
        (b"data = 3", ("'data' cannot be 3", "valid string")),
        (b"epochs = [", ("is not TOML", "Invalid value")),
        (b'model = "\xff"', ("is not TOML", "0xff")),
    ],
    ids=lambda value: value.decode("latin-1") if isinstance(value, bytes) else "",
)
def test_cli_train_refuses_a_bad_configuration(
    content: bytes, parts: tuple[str, ...], cli: Cli, train_words: list[object]
) -> None:
    Path("options.toml").write_bytes(content)
    with nothing_written():
        assert_refused(cli(*train_words, "--config", "options.toml"), "'options.toml'", *parts)


def test_cli_train_refuses_a_missing_configuration_or_no_data(cli: Cli, train_words: list[object]) -> None:
    with nothing_written():
        assert_refused(
            cli(*train_words, "--config", "no.toml"), "no configuration file 'no.toml' (looked from ", "Give the path"
        )
        assert_refused(cli("train"), "no data given", "regraft train photos/")


@pytest.mark.parametrize("words", [("train", "--epochs", "x"), ("predict",), ("no-such-command",), ("train", "--nope")])
def test_cli_exits_with_2_on_bad_usage(words: tuple[str, ...], cli: Cli) -> None:
    with nothing_written():
        result = cli(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def no_network(*_: object, **__: object) -> None:
    raise urllib.error.URLError("no route to host")


class CutOff:
    """A server's answer that is not the file that was asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        self.rest = [b"half a fi", b""]

    def info(self) -> Message:
        return Message()

    def read(self, _: int) -> bytes:
        return self.rest.pop(0)

    def __enter__(self) -> "CutOff":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("answer", "reason"), [(no_network, "no route to host"), (CutOff, "invalid hash value")])
def test_cli_train_says_how_to_go_on_where_weights_cannot_be_downloaded(
    answer: Any, reason: str, cli: Cli, photos: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(workplace / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", answer)
    result = cli("train", photos, "--model", "squeezenet1_1", "--out", "run")
    assert_refused(
        result,
        "the weights of 'squeezenet1_1' cannot be downloaded",
        reason,
        "--weights FILE",
        "--weights none",
    )
    assert not Path("run").exists()
    assert [path for path in (workplace / "cache").rglob("*") if path.is_file()] == []


def test_cli_train_says_how_to_go_on_without_a_network_for_weights_of_timm(
    cli: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", offline)
    with nothing_written():
        assert_refused(
            cli("train", photos, "--model", "timm/mobilenetv3_small_050"),
            "the weights of 'timm/mobilenetv3_small_050' cannot be downloaded",
            "--weights none",
        )


def test_cli_train_refuses_real_weights_of_another_architecture(
    shared: Path, cli: Cli, photos: Path, workplace: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "mobilenet_v1.py"
    file = shared / "weights" / "resnet56-4bfd9763.th"
    with nothing_written():
        result = cli("train", photos, "--model", f"py:{example}:MobileNetV1", "--weights", file, "--trust-code")
        assert_refused(result, f"'{file}'", "MobileNetV1")


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
