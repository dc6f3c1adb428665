"""Text is read into plain values, and whatever is no call of a name with literals is refused, unexecuted."""

import builtins
import math
from typing import Any

import pytest
import timm.layers  # noqa: F401 (so that no test has to)
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import EditError
from regraft.surgery.layer_text.build import construct, construct_all
from regraft.surgery.layer_text.parse import MAX_DEPTH, MAX_LENGTH, MAX_NODES, LayerCall, parsed, written

REFUSED = {
    "leave_mark('x').again('y')": "a call of an attribute access|is no layer",
    "leave_mark('x')": "'leave_mark' is no layer of torch.nn",
    "sum('1')": "'sum' is no layer of torch.nn",
    "print('x', 'y')": "'print' is no layer of torch.nn",
    "marking.leave_mark('x')": "'marking' may not be called",
    "torch.ones(1)": "'torch' may not be called",
    "nn.init.ones_(1)": "'init' may not be called",
    "torch.nn.functional.relu(1)": "'functional' may not be called",
    "timm.layers.create_conv2d(1, 1, 1)": "'timm.layers.create_conv2d' is no layer of timm.layers",
    "timm.layers.create_act.nn.Linear(1, 1)": "may not be called",
    "timm.models.resnet18()": "'timm.models' may not be called",
    "Linear.forward(1)": "'Linear' may not be called",
    "Linear(1, 1).weight": "is an attribute access",
    "Linear(1, 1).forward()": "a call of an attribute access",
    "Linear(1, 1)(1)": "a call of what a call returns",
    "(lambda: 1)()": "a call of a lambda",
    "lambda: Linear(1, 1)": "is a lambda",
    "Linear(lambda: 1, 1)": "'lambda: 1' of 'Linear(lambda: 1, 1)' is a lambda",
    "[Linear(1, 1) for _ in range(9)]": "is a comprehension",
    "{Linear(1, 1) for _ in range(9)}": "is a comprehension",
    "{1: Linear(1, 1) for _ in range(9)}": "is a comprehension",
    "(Linear(1, 1) for _ in range(9))": "is a comprehension",
    "Softmax(f'{1}')": "is an f-string",
    "Linear((x := 1), 1)": "is an assignment",
    "Linear(*(1, 1))": "is a * argument",
    "(*Linear(1, 1), ReLU())": "is a * argument",
    "*Linear(1, 1), ReLU()": "is malformed",
    "Linear(**{'in_features': 1})": "is a ** argument",
    "ModuleDict({**{}})": "a dict whose keys",
    "ModuleDict({ReLU(): ReLU()})": "a dict whose keys",
    "ModuleDict({'a': ReLU(), 'a': Tanh()})": "the key 'a' twice",
    "Linear(1, in_features=1, in_features=2)": "the argument 'in_features' twice",
    "Linear(10**2, 10**2)": "'10**2' of 'Linear(10**2, 10**2)' is a computation",
    "Linear('a' * 10, 1)": "is a computation",
    "Linear(1 if 1 else 2, 1)": "is a condition",
    "Linear(1 and 2, 1)": "is a computation",
    "Linear(not 1, 1)": "is a computation",
    "Linear(1 < 2, 1)": "is a comparison",
    "Linear(~1, 1)": "is a computation",
    "Linear(-True, 1)": "a sign before a boolean",
    "Linear((1, 2)[0], 1)": "is a subscript",
    "Linear({1}, 1)": "is a set",
    "Linear(b'1', 1)": "a literal of another kind",
    "Linear(1j, 1)": "a literal of another kind",
    "Linear(..., 1)": "a literal of another kind",
    "Linear(x, 1)": "'x' of 'Linear(x, 1)' is a name",
    "TransformerEncoderLayer(8, 2, activation=ReLU)": "write ReLU()",
    "Linear(1, 1, bias=false)": "Nearest: 'False'",
    "import math": "is malformed",
    "Linear(1, 1); ReLU()": "is malformed",
    "x = Linear(1, 1)": "is malformed",
    "Linear(1,\x00 1)": "malformed",
    "Linear(512,": "'(' was never closed",
    "Linear(" + "9" * 4_301 + ", 1)": "malformed",
    "": "is malformed",
    "()": "which is no layer",
    "3": "holds 3, which is no layer",
    "Linear(1, 1), 3": "holds 3, which is no layer",
    "await Linear(1, 1)": "is malformed|is an await",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[text[:40] for text in REFUSED])
def test_construct_all_refuses_anything_else_and_executes_nothing(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "eval", lambda *_: pytest.fail("eval was called"))
    monkeypatch.setattr(builtins, "exec", lambda *_: pytest.fail("exec was called"))
    with pytest.raises(EditError) as caught:
        construct_all(text)
    assert any(part in str(caught.value) for part in message.split("|"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        *("-" * 60 + "1", "(" * 210, "[" * 60 + "]" * 60, "a" + ".b" * 60, "not " * 60 + "1"),
        *("a" + "()" * 60, "1+" * 60 + "1", "-" * 210 + "1", "f(" * 60 + ")" * 60, "a and " * 60 + "a"),
    ],
    ids=lambda text: text[:6],
)
def test_construct_refuses_deep_text(text: str) -> None:
    with pytest.raises(EditError, match=r"is too deep|nested more than 50 deep|malformed|computation|call"):
        construct(text)


def test_parsed_names_its_limits() -> None:
    with pytest.raises(EditError, match=f"has 100,001 characters, and no more than {MAX_LENGTH:,} are read"):
        parsed("ReLU()" + " " * (MAX_LENGTH - 5))
    with pytest.raises(EditError, match=f"has more than {MAX_NODES:,} parts"):
        parsed("f(" + "1," * MAX_NODES + ")")
    with pytest.raises(EditError, match=f"nested more than {MAX_DEPTH} deep"):
        parsed("f(" * (MAX_DEPTH + 1) + ")" * (MAX_DEPTH + 1))
    assert str(parsed("f(" * MAX_DEPTH + ")" * MAX_DEPTH)) == "f(" * MAX_DEPTH + ")" * MAX_DEPTH


def test_parsed_gives_no_warning_for_odd_text() -> None:
    assert parsed(r"f('\d')") == LayerCall("f", (r"\d",))


names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).map(lambda name: f"{name}_")
literals = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(codec="utf-8"))
)
values = st.recursive(
    literals,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(LayerCall, names, st.lists(inner, max_size=3).map(tuple), st.dictionaries(names, inner, max_size=3))
    ),
    max_leaves=8,
)


@given(st.builds(LayerCall, names, st.lists(values, max_size=3).map(tuple), st.dictionaries(names, values, max_size=3)))
def test_written_is_read_back_by_parsed(call: LayerCall) -> None:
    assert parsed(written(call)) == call
    assert written(parsed(written(call))) == written(call)  # which tells True from 1, and -0.0 from 0


def test_written_refuses_what_no_text_stands_for() -> None:
    assert written((math.inf, -math.inf)) == "(1e999, -1e999)"
    for value in (math.nan, object(), b"", {1: math.nan}):
        with pytest.raises(EditError, match="which no text stands for"):
            written(value)
