"""Every option and argument of every command with wrong values: refused in one message of ours, or taken.

The commands run in this process; each try starts from a command line that works, and exchanges one word of it.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import typer.testing
from public_calls import Scene
from wrong_values import write_files

import regraft
from regraft.cli.app import app
from regraft.display import printable
from regraft.errors import RunError
from scene import listing

TRIES = 40
NUMBERS = ("0", "-1", "7", "1.5", "1e-3", "nan", "inf", "1e400", "9" * 30, "0x10", "1,2", "True", "¼")
TEXTS = (
    "", " ", "-", "--", "--no-such-option", "*", "[", "re:(", "type:", "children[9]", "params:", "head:3", "head:",
    ":3", "a=b", "=", "0=", "=ReLU()", "0=ReLU(", "ReLU()", "Linear(", "Linear(4,4)", "py:", "py:nothing:Net", "timm/",
    "auto", "resnet18", "adamw", "cuda:99", "quantum", "none", "default", "\udcff", "a\nb", "x" * 300, "x" * 5000,
    "1,3,32,32", "1,3,32;1", "(=b", r"a=\9",
)  # fmt: skip
PARTS, SLOW_PARTS = 8, 1  # of more than 5,000 command lines, and how many of the parts the slow tests run
ENDLESS = {("train", "epochs"): {"7"}, ("train", "workers"): {"7"}}  # not wrong, and slow

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about values that are then refused


@dataclass(frozen=True)
class CommandLine:
    """A command that works: its positional words and options by the names of its parameters, and its flags."""

    command: str
    values: Mapping[str, str]
    flags: tuple[str, ...] = ()
    positional: tuple[str, ...] = field(default=())

    def words(self, changed: Mapping[str, str]) -> list[str]:
        values = {**self.values, **changed}
        options = [
            word
            for name, value in values.items()
            if name not in self.positional
            for word in (option_of(parameters(self.command)[name]), value)
        ]
        places = [values[name] for name in self.positional if name in values]
        return [*self.command.split(), *places, *self.flags, *options]


@functools.cache
def parameters(command: str) -> dict[str, click.Parameter]:
    group: Any = typer.main.get_command(app)
    for word in command.split():
        group = group.commands[word]
    return {str(parameter.name): parameter for parameter in group.params}


def commands(group: Any = None, before: str = "") -> Iterator[str]:
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def option_of(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def classifier(scene: Scene) -> Path:
    return regraft.save(scene.classifier, scene.net.parent / "classifier.safetensors")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunError("no network")

    monkeypatch.setattr("regraft.demo.run_demo", refuse)  # half a minute of training
    for module in ("torch.hub", "torchvision.models._api"):
        monkeypatch.setattr(f"{module}.load_state_dict_from_url", refuse)


def command_lines(scene: Scene, classifier: Path) -> list[CommandLine]:
    saved, photos, delta = str(scene.saved), str(scene.photos), str(scene.delta)
    small = {"model": scene.tiny, "weights": "none", "epochs": "1", "batch_size": "4"}
    plan = {"model": "Sequential(Linear(4, 3), ReLU(), Linear(3, 2))", "out": "new.safetensors", "weights": "none"}
    return [
        CommandLine("train", {"data": photos, **small, "out": "run"}, ("--trust-code",), ("data",)),
        CommandLine(
            "evaluate",
            {"checkpoint": str(classifier), "data": photos, "base": str(scene.photos)},
            ("--trust-code",),
            ("checkpoint", "data"),
        ),
        CommandLine(
            "predict", {"checkpoint": str(classifier), "images": photos}, ("--trust-code",), ("checkpoint", "images")
        ),
        CommandLine(
            "advise",
            {"words": scene.tiny, "weights": "none", "image_size": "32"},
            (photos, "--trust-code"),
            ("words",),
        ),
        CommandLine(
            "compare",
            {"data": photos, "model": scene.tiny, "weights": "none", "epochs": "3", "images": "1", "seeds": "1"},
            ("--trust-code", "--ways=scratch"),
            ("data",),
        ),
        CommandLine("check", {"data": photos}, ("--no-labels", "--exit-zero"), ("data",)),
        CommandLine("inspect", {"model": scene.tiny}, ("--trust-code",), ("model",)),
        CommandLine("inspect", {"model": saved}, (), ("model",)),
        CommandLine("surgery", plan, (), ("model", "layers")),
        CommandLine("convert", {"file": str(scene.state_dict), "out": "new.safetensors"}, (), ("file", "out")),
        CommandLine("diff", {"a": saved, "b": delta}, (), ("a", "b")),
        CommandLine("merge", {"delta": delta, "out": "new.safetensors", "base": saved}, (), ("delta",)),
        CommandLine("models", {"pattern": "resnet1*"}, (), ("pattern",)),
        CommandLine("demo", {"out": "demo"}),
        CommandLine("cache list", {}),
        CommandLine("cache clear", {}),
    ]


def tries(lines: list[CommandLine], files: list[str]) -> list[tuple[list[str], str, str]]:
    """List command lines with one word exchanged or one flag added, what that is, and its value."""
    listed = []
    for line in lines:
        for name, parameter in parameters(line.command).items():
            if getattr(parameter, "is_flag", False):
                listed += [
                    ([*line.words({}), flag], name, flag) for flag in (*parameter.opts, *parameter.secondary_opts)
                ]
                continue
            skipped = ENDLESS.get((line.command, name), set())
            listed += [
                (line.words({name: value}), name, value) for value in (*NUMBERS, *TEXTS, *files) if value not in skipped
            ]
    return listed


def test_cli_commands_are_all_tried(scene: Scene, classifier: Path) -> None:
    assert {line.command for line in command_lines(scene, classifier)} == set(commands())


@pytest.mark.slow
def test_cli_command_lines_work(scene: Scene, classifier: Path, cli: Callable[..., typer.testing.Result]) -> None:
    for line in command_lines(scene, classifier):
        result = cli(*line.words({}))
        assert result.exit_code == (1 if line.command == "demo" else 0), (line.words({}), result.stderr)
        for path in (Path("new.safetensors"), Path("run")):
            remove(path)


def test_cli_ends_no_wrong_option_in_a_bare_error(
    scene: Scene, classifier: Path, workplace: Path, cli: Callable[..., typer.testing.Result]
) -> None:
    listed = tries(command_lines(scene, classifier), own_files(workplace))
    chosen = random.Random(0).sample(listed, TRIES)
    sweep(chosen, cli)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLOW_PARTS))
def test_cli_ends_no_wrong_option_of_any_command_in_a_bare_error(
    part: int, scene: Scene, classifier: Path, workplace: Path, cli: Callable[..., typer.testing.Result]
) -> None:
    sweep(tries(command_lines(scene, classifier), own_files(workplace))[part::PARTS], cli)


def own_files(folder: Path) -> list[str]:
    return sorted(str(make()) for key, make in write_files(folder).items() if key.startswith("'"))


def sweep(chosen: list[tuple[list[str], str, str]], cli: Callable[..., typer.testing.Result]) -> None:
    problems = [problem for one in chosen if (problem := problem_of(*one, cli)) is not None]
    assert not problems, f"{len(problems)} of {len(chosen)}:\n" + "\n".join(problems)


def problem_of(words: list[str], name: str, value: str, cli: Callable[..., typer.testing.Result]) -> str | None:
    """Run one command line, and say what is wrong with how it ended; None: nothing."""
    before = listing(Path.cwd())
    result = cli(*words)
    shown = f"regraft {' '.join(words)[:300]!r} ({name}={value[:40]!r})"
    written = [Path(path) for path in listing(Path.cwd()).keys() - before.keys()]
    for path in written:
        remove(path)
    if not isinstance(result.exception, SystemExit | None):
        return f"{shown}: {type(result.exception).__name__}: {result.exception}"
    message = (result.stderr.splitlines() or [""])[-1]
    if result.exit_code == 0 or message == "error: no network":  # which is cut off here
        return None
    is_ours = "error: " in result.stderr or "Usage: " in result.stderr or result.stderr == ""
    if result.exit_code != 2:
        return f"{shown}: exit code {result.exit_code}: {message}"
    if not is_ours or "Traceback" in result.stderr:
        return f"{shown}: no message of ours: {result.stderr[-300:]}"
    names = {name, name.replace("_", "-"), name.replace("_", " "), name.partition("_")[0]}
    has_diverged = "loss is nan" in message  # of a number that may be so large
    if not has_diverged and not any(word in result.stderr for word in (*names, *texts(value))):
        return f"{shown}: does not say which: {result.stderr[-300:]}"
    if result.stdout:
        return f"{shown}: printed {result.stdout[:100]!r}, and failed"
    if written:
        return f"{shown}: wrote {sorted(map(str, written))}, and failed: {message}"
    return None


def texts(value: str) -> list[str]:
    """List how a message may quote a value: its beginning as it is, escaped, or without what is around it."""
    beginning = value[:20]
    quoted = [beginning, beginning.strip(), " ".join(beginning.split()), printable(beginning), repr(beginning)[1:-1]]
    quoted += [str(Path(beginning)), Path(value[:200]).name]
    parts = [part for sign in ":=;," for part in value[:200].split(sign)]
    return [text for text in (*quoted, *parts, repr(beginning)) if text]


def remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
