import ast
import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import regraft
from regraft import errors

PACKAGE = Path(regraft.__file__)
FAILURES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BaseException)]


@pytest.mark.parametrize("name", regraft.__all__)
def test_public_api_names_all_resolve_and_have_a_docstring(name: str) -> None:
    value = getattr(regraft, name)
    assert value.__name__ == name
    text = value.__doc__ or ""
    assert re.match(r"[A-Z`].*[.:]$", text.strip().splitlines()[0]), text
    assert not (inspect.isclass(value) and text.startswith(f"{name}("))  # what dataclasses write by themselves


@pytest.mark.parametrize("name", [name for name in regraft.__all__ if inspect.isfunction(getattr(regraft, name))])
def test_public_api_arguments_are_all_documented(name: str) -> None:
    function = getattr(regraft, name)
    arguments = set(inspect.signature(function).parameters)
    documented = set(re.findall(r"^\s*\*{0,2}(\w+): ", function.__doc__, re.MULTILINE))
    missing = arguments - documented
    assert not missing or len(arguments) <= 2, f"{name} does not say what {missing} are"


@pytest.mark.parametrize("name", [name for name in regraft.__all__ if inspect.isclass(getattr(regraft, name))])
def test_public_api_values_cannot_be_changed(name: str) -> None:
    value = getattr(regraft, name)
    if issubclass(value, BaseModel):
        assert value.model_config.get("frozen")
    elif not issubclass(value, (BaseException, regraft.Progress)):  # a listener of the user's own keeps what it hears
        assert value.__dataclass_params__.frozen


def test_public_api_names_are_sorted_and_listed() -> None:
    assert regraft.__all__ == sorted(regraft.__all__)
    assert set(regraft.__all__) <= set(dir(regraft))


def test_public_api_is_the_same_for_type_checkers() -> None:
    tree = ast.parse(PACKAGE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == set(regraft.__all__)
    assert homes == {name: f"regraft.{home}" for name, home in regraft._HOMES.items()}


def test_public_api_has_no_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'regraft' has no attribute 'train'"):
        regraft.train  # noqa: B018


def test_public_api_hides_no_module_of_its_names() -> None:
    names = {entry.stem for entry in PACKAGE.parent.iterdir()}
    assert not names & set(regraft.__all__)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: error.__name__)
def test_public_api_errors_have_a_place_in_the_tree_and_an_exit_code(error: type[BaseException]) -> None:
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)
    expected = 130 if error is errors.Interrupted else 2 if issubclass(error, errors.InputError) else 1
    assert error.exit_code == expected
