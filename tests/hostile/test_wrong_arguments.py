"""A sweep of wrong arguments over every public name: it works, or says what was wrong with what, and nothing changed.

`public_calls` has a valid call of each name, `wrong_values` some two hundred values. In each try one or two arguments
of a valid call are exchanged. An outcome is right if the call works, or if a `RegraftError` names the argument or the
value, and then no network, file or random state is other than before. Python's own TypeError for calls with a wrong
number of arguments is no concern of these tests, as every call here fits its signature; nor is what a network (one of
torch, or either part of a partition) says when it is called on what it does not take.

Left out are the values of plain results (`Finding`, `Diff` and the like), which functions return and nobody passes, and
`RegraftError` itself.
"""

import inspect
import random
import shutil
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from public_calls import Call, Scene, calls
from torch import nn
from torch.nn.parameter import is_lazy
from wrong_values import all_values

import oracles
import regraft
from regraft.errors import ArgumentError, ConfigError, LossError, RegraftError
from scene import listing

TRIES, SLOW_TRIES = 300, 5_000
NETWORK = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
RESULTS = {
    "Advice", "Comparison", "DataFinding", "DataReport", "Diff", "Finding", "FitResult", "FreezeReport", "LayerSummary",
    "LoadReport", "Metrics", "ModelSummary", "Partition", "Prediction", "Progress", "Ranking", "RegraftError",
}  # fmt: skip
SLOW = {"compare", "write_report", "to_source"}  # seconds for each call that works
ENDLESS = {("fit", "epochs"), ("fit", "model"), ("fit", "optimizer")}  # a number of epochs that is no mistake to refuse

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about values that it then refuses

Try = tuple[Call, tuple[str, ...], tuple[str, ...]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def values(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    for module in ("torch.hub", "torchvision.models._api"):
        monkeypatch.setattr(f"{module}.load_state_dict_from_url", offline)
    inner = workplace / "inner" / "most"  # so that ".." is a small folder as well
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    return all_values(inner)


def test_wrong_arguments_are_tried_on_every_public_name_that_takes_arguments(scene: Scene) -> None:
    known = {call.name.partition(".")[0] for call in calls(scene)}
    assert known | RESULTS == set(regraft.__all__) | {"Metrics", "Partition"}


def test_wrong_arguments_start_from_calls_that_are_valid(scene: Scene, values: dict[str, Callable[[], Any]]) -> None:
    for call in calls(scene):
        call.function(**{name: make() for name, make in call.arguments.items()})


def test_wrong_arguments_end_in_no_bare_error(
    scene: Scene, values: dict[str, Callable[[], Any]], random_state: Callable[[], object]
) -> None:
    listed = [call for call in calls(scene) if call.name not in SLOW]
    _sweep(drawn(listed, values, TRIES, seed=0), values, random_state)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_wrong_arguments_end_in_no_bare_error_in_5000_tries(
    seed: int, scene: Scene, values: dict[str, Callable[[], Any]], random_state: Callable[[], object]
) -> None:
    _sweep(drawn(calls(scene), values, SLOW_TRIES // 5, seed), values, random_state)


def drawn(listed: list[Call], values: dict[str, Any], count: int, seed: int) -> Iterator[Try]:
    """Draw tries that go around all arguments of all calls; in every fourth, a second argument is wrong as well."""
    chance = random.Random(seed)
    places = [(call, name) for call in listed for name in call.arguments]
    chance.shuffle(places)
    for number in range(count):
        call, name = places[number % len(places)]
        others = [other for other in call.arguments if other != name]
        names = (name, chance.choice(others)) if number % 4 == 3 and others else (name,)
        keys = tuple(chance.choice(list(values)) for _ in names)
        if not any((call.name, name) in ENDLESS for name in names):
            yield call, names, keys


def _sweep(tries: Iterator[Try], values: dict[str, Callable[[], Any]], random_state: Callable[[], object]) -> None:
    problems = [problem for one in tries if (problem := _problem(*one, values, random_state)) is not None]
    assert not problems, "\n".join(problems)


def _problem(
    call: Call,
    names: tuple[str, ...],
    keys: tuple[str, ...],
    values: dict[str, Callable[[], Any]],
    random_state: Callable[[], object],
) -> str | None:
    """Make one call, and say what is wrong with how it ended; None: nothing."""
    arguments = {name: make() for name, make in call.arguments.items()}
    arguments |= {name: values[key]() for name, key in zip(names, keys, strict=True)}
    text = f"{call.name}({', '.join(f'{name}={key}' for name, key in zip(names, keys, strict=True))})"
    networks = [value for value in arguments.values() if isinstance(value, nn.Module)]
    before = [snapshot(network) for network in networks], listing(Path.cwd()), random_state()
    try:
        call.function(**arguments)
    except LossError:  # training had begun, in place
        return None
    except RegraftError as error:
        message = str(error)
        after = [snapshot(network) for network in networks], listing(Path.cwd()), random_state()
        if not all(map(same, before[0], after[0])):
            return f"{text}: changed a network, and raised {message}"
        if before[1] != after[1]:
            return f"{text}: wrote {set(after[1]) ^ set(before[1])}, and raised {message}"
        if before[2] != after[2]:
            return f"{text}: moved the random state, and raised {message}"
        shown = words(names[0], arguments[names[0]]) + [type(value).__name__ for value in arguments.values()]
        is_named = len(names) > 1 or any(word in message for word in shown)
        return None if is_named else f"{text}: does not say which argument: {message}"
    except Exception as error:
        return f"{text}: {type(error).__name__}: {error}"
    for name in listing(Path.cwd()).keys() - before[1].keys():  # so that tries do not depend on one another
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return None


def words(name: str, value: Any) -> list[str]:
    """List what a message about an argument may show of it."""
    parts = (
        [*value.keys(), *value.values()]
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, list | tuple)
        else []
    )
    shown = [name.replace("_", " "), name, type(value).__name__]
    for one in (value, *parts):
        shown += [type(one).__name__, str(getattr(one, "__name__", "-none-"))]
        if isinstance(one, torch.Tensor):
            shown.append(str(tuple(one.shape)))
        elif isinstance(one, str | bytes | int | float | Path) and not (isinstance(one, int) and abs(one) > 2**70):
            shown.append(str(one)[:30])
        if isinstance(one, bytes | bytearray):  # which pydantic reads as text
            shown.append(repr(one.decode()))
    return [word for word in shown if word]


def snapshot(network: nn.Module) -> Any:
    """Write down what a failed call must not change, also of networks whose tensors have no values."""
    tensors = (*network.parameters(), *network.buffers())
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        return [(id(tensor), tensor.requires_grad) for tensor in tensors], [m.training for m in network.modules()]
    return oracles.snapshot(network)


def same(before: Any, after: Any) -> bool:
    return oracles.same(before, after) if isinstance(before, dict) else before == after


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: regraft.freeze(nn.ReLU),
            r"freeze: model is the class ReLU, expected a torch.nn.Module. Make one: ReLU",
        ),
        (lambda: regraft.freeze(regraft.select), r"model is the function select, .* Call it first: select\(…\)\."),
        (lambda: regraft.freeze("net.pth"), r"model is 'net.pth', expected .*regraft.load\(PATH\) reads one"),
        (lambda: regraft.audit({"w": torch.zeros(2)}), r"model is a dict, .* give it these with load_state_dict"),
        (lambda: regraft.summary([nn.ReLU()]), r"model is a list of 1, .*Sequential\(\*layers\)"),
        (lambda: regraft.param_groups(nn.Linear(1, 1).parameters(), 1.0), r"model is a generator, .*network itself"),
        (lambda: regraft.append(nn.ReLU(), nn.ReLU), r"layers\[0\] is the class ReLU, .* Make one: ReLU\(…\)"),
        (
            lambda: regraft.append(nn.ReLU(), "ReLU()"),
            r"layers\[0\] is 'ReLU\(\)', expected a torch.nn.Module",
        ),
        (lambda: regraft.select(nn.ReLU(), b"0"), r"patterns\[0\] is a bytes, expected a pattern.* Decode it first"),
        (lambda: regraft.param_groups(nn.Linear(1, 1), "1e-3"), r"lr is '1e-3', expected a finite number.* 1e-3\."),
        (lambda: regraft.param_groups(nn.Linear(1, 1), float("nan")), r"lr is nan, expected a finite number"),
        (lambda: regraft.stitch(nn.ReLU(), nn.ReLU(), cut=("0",)), r"cut is a tuple of 1, expected a tuple of 2"),
        (lambda: regraft.save(nn.ReLU(), "a\0b"), r"path is 'a\\x00b', expected a path\..* null byte"),
        (
            lambda: regraft.save(nn.Linear(1, 1), "."),
            r"path is the folder '\.', .*Name a file in it\. Nothing was writ",
        ),
        (lambda: regraft.save(nn.LazyLinear(1), "a"), r"'weight' of model \(LazyLinear\) has no shape yet"),
        (lambda: regraft.diff(nn.Linear(1, 1, device="meta"), nn.ReLU()), r"'weight' of a \(Linear\) holds no values"),
        (lambda: regraft.load_weights(nn.ReLU(), "a", strict="no"), r"strict is 'no', expected True or False"),
        (lambda: regraft.load_weights(nn.ReLU(), "a", rename={"a": 1}), r"rename\['a'\] is 1, expected a string"),
        (lambda: regraft.summary(nn.ReLU(), torch.zeros(2)), r"input_size is a Tensor of shape \(2,\), .*\.tolist"),
        (lambda: regraft.remove(NETWORK, NETWORK[1]), r"path is a ReLU, expected a string\. .* by its path: '1'\."),
        (lambda: regraft.build_optimizer(NETWORK, "sgd", lr=1.0), r"model is 'sgd', .*order is \(name_or_class, model"),
        (lambda: regraft.replace_head(NETWORK, "10"), r"new is '10', .* Write it without quotes: 10\."),
        (lambda: regraft.replace_head(NETWORK, ["cat", "dog"]), r"new is a list of 2, .* Pass their number: 2\."),
        (lambda: regraft.create_model("resnet18", weights=False), r"weights is False, .*Write weights=\"none\"\."),
        (lambda: regraft.create_model(NETWORK), r"name is a Sequential, which is a network already\. .*replace_head"),
        (lambda: regraft.create_model(regraft.load), r"name is the function load, .* Pass its name: 'load'\."),
        (lambda: regraft.audit(NETWORK, 3), r"optimizer is 3, expected an Optimizer or None\."),
        (lambda: regraft.fit(NETWORK, [], progress="no"), r"progress is 'no', expected a Progress or True or False\."),
        (lambda: regraft.truncate(nn.ReLU(), drop=2.0), r"drop is 2.0, expected a whole number .* or None"),
        (lambda: regraft.evaluate(nn.ReLU(), [], batch_size=0), r"batch_size is 0, expected at least 1\. Nothing was"),
    ],
)
def test_argument_error_names_a_wrong_kind_with_what_to_write_instead(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        call()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, r"no argument 'pretrained'\. Write weights=\"default\"\."),
        ({"pretrained": False}, r"no argument 'pretrained'\. Write weights=\"none\"\."),
        ({"in_chans": 1}, r"no argument 'in_chans'\. .*regraft.replace_stem\(model, channels\)"),
        ({"include_top": False}, r"no argument 'include_top'\. .*regraft.truncate\(model, drop=1\)"),
        ({"num_labels": 3}, r"no argument 'num_labels'\. Write num_classes=K\."),
        ({"num_clases": 3}, r"no argument 'num_clases'\. Nearest: 'num_classes'\."),
        ({"num_class": 3}, r"no argument 'num_class'\. Nearest: 'num_classes'\."),
        ({"in_channels": 1}, r"no argument 'in_channels'\. .*regraft.replace_stem\(model, channels\)"),
        ({"device": "cuda"}, r"no argument 'device'\. Move the finished network: model.to\(device\)\."),
        ({"xyzzy": 3}, r"no argument 'xyzzy'\. It takes weights, num_classes, trust_code\."),
    ],
    ids=str,
)
def test_create_model_says_how_to_write_what_other_libraries_call_otherwise(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        regraft.create_model("resnet18", **options)


@pytest.mark.parametrize(
    ("option", "name"),
    [("learning_rate", "lr"), ("num_epochs", "epochs"), ("validation_split", "validation_share"), ("bs", "batch_size"),
     ("num_workers", "workers"), ("criterion", "loss"), ("output_dir", "out"), ("random_state", "seed")],
)  # fmt: skip
def test_fit_says_how_to_write_what_other_libraries_call_otherwise(option: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no option '{option}'\. Write {name}=…\."):
        regraft.fit(nn.Linear(2, 2), ([], []), **{option: 1})
    with pytest.raises(ConfigError, match=rf"TrainConfig: no option '{option}'\. Write {name}=…\."):
        regraft.TrainConfig(**{option: 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regraft.TrainConfig(epochs="many"), r"TrainConfig: 'epochs' cannot be 'many': input should be"),
        (lambda: regraft.TrainConfig(lr=float("inf")), r"TrainConfig: 'lr' cannot be inf: input should be a finite"),
        (lambda: regraft.TrainConfig(epochs=10**400), r"TrainConfig: 'epochs' cannot be 10*… \(401 characters\)"),
        (lambda: regraft.Preprocessing(size=0), r"Preprocessing: 'size' cannot be 0: input should be greater"),
        (lambda: regraft.Plan(), r"Plan: 'source' is missing"),
        (lambda: regraft.Plan(source="resnet18", edit=()), r"Plan: no option 'edit'\. Nearest: 'edits'"),
    ],
)
def test_config_error_where_a_value_of_ours_is_constructed_wrongly(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_build_optimizer_names_the_options_that_were_meant() -> None:
    with pytest.raises(ConfigError, match=r"AdamW does not take \{'beta': .*\}: .*Nearest: 'betas'\."):
        regraft.build_optimizer("adamw", nn.Linear(2, 2), lr=1.0, beta=(0.9, 0.9))
    with pytest.raises(ConfigError, match=r"<lambda> makes a dict, expected an optimizer\. Name one, as 'adamw'\."):
        regraft.build_optimizer(lambda groups, lr: {}, nn.Linear(2, 2), lr=1.0)  # type: ignore[arg-type, return-value]


def test_fit_and_evaluate_refuse_batches_that_do_not_fit() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.zeros(4, 4), torch.tensor([0, 1, 2, 0])
    cases: list[tuple[Any, str]] = [
        ([(x, y[:3])], r"inputs of shape \(4, 4\) with targets of shape \(3,\), expected \(N, …\) and \(N,\)"),
        ([(x, y + 5)], r"the data has the label 5, the network has 3 outputs: expected labels from 0 to 2"),
        ([(x, y - 1)], r"the data has the label -1, the network has 3 outputs"),
        ([(x, y.float())], r"outputs have the shape \(4, 3\) and the targets \(4,\): expected one target for each"),
        ([(x, y.to(torch.complex64))], r"the targets are complex64 of the shape \(4,\), expected classes \(N,\)"),
        ([(x, y[:, None].expand(4, 2))], r"the targets are int64 of the shape \(4, 2\), expected classes \(N,\)"),
        ([(x[:, :2], y)], r"Linear \(weights in float32\) fails on these inputs: .*4x2.*Give inputs of the shape"),
        (x, r"a Tensor is no data\. Expected a folder, a Dataset"),
        (iter([]), r"the data is empty\. Give at least one batch"),
    ]
    for data, message in cases:
        with pytest.raises(RegraftError, match=message):
            regraft.evaluate(model, data)
    with pytest.raises(RegraftError, match=r"the training data has the label -1, the network has 3 outputs"):
        regraft.fit(model, ([(x, y - 1)], [(x, y)]), epochs=1)
    three_dimensional = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))
    with pytest.raises(RegraftError, match=r"for outputs of the shape \(4, 3, 1\), expected \(N, K\)"):
        regraft.evaluate(three_dimensional, [(x, y)])


def test_replace_head_and_param_groups_take_numbers_of_numpy() -> None:
    import numpy as np

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert regraft.replace_head(model, np.int64(5))[1].out_features == 5  # type: ignore[arg-type, index]
    assert regraft.param_groups(model, np.float32(0.5))[0]["lr"] == 0.5  # type: ignore[arg-type]


def test_wrong_arguments_are_checked_first_by_every_public_function() -> None:
    for name in regraft.__all__:
        function = getattr(regraft, name)
        if inspect.isfunction(function):
            source = inspect.getsource(inspect.unwrap(function))
            assert f"check_arguments({name}, locals())" in source, name
