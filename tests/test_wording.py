"""Messages name options in the caller's language, through `regraft.wording`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import regraft
from regraft.errors import InputError
from regraft.wording import flags_in_messages, for_caller, option
from scene import Cli, Fit, assert_refused
from scene import cli as cli
from scene import fit as fit
from scene import net_file as net_file
from scene import photos as photos
from scene import tiny_net as tiny_net
from scene import train_words as train_words
from scene import workplace as workplace

SOURCE = Path(regraft.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")
COMMANDS = ("train_options.py", "report/suggestions.py", "trials/ways.py")  # the options of one, and commands to copy
# Of the command line alone: its own code, its help, a command to copy, flags of torchrun and tar, styles of pages.
OF_COMMANDS = re.compile(r"`regraft [a-z]+.*`|--nproc_per_node|--format=ustar|var\(--|--grid|style=")


class WithoutWording(ast.NodeTransformer):
    """Takes out docstrings, and what `for_caller` words."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_worded = isinstance(node.func, ast.Name) and node.func.id == "for_caller"
        return ast.Constant(None) if is_worded else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the texts in some code, each with its formatted parts."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.JoinedStr) or (isinstance(inner, ast.Constant) and isinstance(inner.value, str)):
            yield ast.unparse(inner)
        else:
            yield from texts(inner)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_for_caller_words_all_flags_in_messages(path: Path) -> None:
    name = path.relative_to(SOURCE)
    if name.parts[0] == "cli" or name.as_posix() in COMMANDS:
        return
    tree = WithoutWording().visit(ast.parse(path.read_text(encoding="utf-8")))
    flagged = [text for text in texts(tree) if FLAG.search(text)]
    assert [text for text in flagged if not OF_COMMANDS.search(text)] == []


WRONG = {
    "epochs": (["--epochs", "0"], {"epochs": 0}, "--epochs cannot be 0", "'epochs' cannot be 0"),
    "device": (["--device", "tpu"], {"device": "tpu"}, "Try --device cpu.", "Try device='cpu'."),
    "contradiction": (
        ["--unfreeze", "head:1", "--unfreeze-all"],
        {"unfreeze": "head:1", "unfreeze_all": True},
        "excludes --freeze, --freeze-until and --unfreeze-all",
        "excludes freeze, freeze_until and unfreeze_all",
    ),
    "frozen": (["--freeze", "*"], {"freeze": ("*",)}, "pass --unfreeze-all", "regraft.unfreeze(model, 'fc')"),
    "rate": (["--lr", "1e30"], {"lr": 1e30}, "--precision fp32", "precision='fp32'"),
    "choice": (["--augment", "flips"], {"augment": "flips"}, "Nearest: 'flip'.", "Nearest: 'flip'."),
}


@pytest.mark.parametrize("name", WRONG)
def test_for_caller_gives_flags_to_the_command_line_and_arguments_to_python(
    name: str, cli: Cli, fit: Fit, train_words: list[object]
) -> None:
    words, options, for_command, for_python = WRONG[name]
    assert_refused(cli(*train_words, "--out", "run", *words), for_command)
    with pytest.raises(InputError) as refused:
        fit(out="run", **options)
    assert for_python in str(refused.value)
    assert not FLAG.search(str(refused.value))


def test_flags_in_messages_ends_with_its_block() -> None:
    with pytest.raises(ValueError, match="--out FOLDER"), flags_in_messages():
        raise ValueError(option("out", "FOLDER"))
    assert for_caller(python="Python", command="command") == "Python"
