"""Tables of numbers that are not what they should be."""

from pathlib import Path

import pytest

from scene import Cli, assert_refused, nothing_written, only_json

HEAD = "path,target\n"
ROWS = "".join(f"photos/cats/{number}.png,{number}.5\n" for number in range(6))

BAD = {
    "missing columns": ("path,label\n" + ROWS, ("bad.csv' has the columns ['path', 'label']", "expected path,target")),
    "empty": ("", ("bad.csv' has the columns None", "expected path,target")),
    "no rows": (HEAD, ("bad.csv' has 0 rows", "need at least 2")),
    "a word": (HEAD + ROWS + "photos/dogs/1.png,cat\n", ("bad.csv', line 8: the target 'cat' is not a number",)),
    "nan": (HEAD + ROWS + "photos/dogs/1.png,nan\n", ("bad.csv', line 8: the target 'nan'", "Expected a finite one")),
    "infinity": (HEAD + "photos/dogs/1.png,-inf\n" + ROWS, ("line 2: the target '-inf'", "Expected a finite one")),
    "no target": (HEAD + "photos/dogs/1.png\n" + ROWS, ("line 2: the target '' is not a number",)),
    "no path": ("target,path\n1.5\n2.5,photos/dogs/1.png\n", ("line 2: there is no path", "relative to the table")),
    "an empty path": (HEAD + ",1\n" + ROWS, ("line 2: there is no path", "relative to the table")),
    "a bad split": (
        "path,target,split\nphotos/cats/1.png,1,tets\n",
        ("line 2: the split 'tets' is neither 'train' nor 'val'",),
    ),
    "nothing to learn from": (
        "path,target,split\nphotos/cats/1.png,1,val\nphotos/cats/2.png,1,val\n",
        ("bad.csv' has 0 rows for training and 2 for validation",),
    ),
    "missing photos": (
        HEAD + ROWS + "no.png,1\nnor.png,1\n",
        ("2 of 8 files cannot be read", "no.png': no such file", "--max-unreadable"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_cli_train_refuses_a_bad_table(case: str, workplace: Path, cli: Cli, train_words: list[object]) -> None:
    text, parts = BAD[case]
    (workplace / "bad.csv").write_text(text)
    with nothing_written():
        assert_refused(cli("train", "bad.csv", *train_words[2:]), *parts)


def test_cli_train_refuses_a_table_in_another_encoding(workplace: Path, cli: Cli, train_words: list[object]) -> None:
    (workplace / "bad.csv").write_bytes((HEAD + "é.png,1\n").encode("latin-1"))
    with nothing_written():
        assert_refused(cli("train", "bad.csv", *train_words[2:]), "'bad.csv' is no .csv table in UTF-8", "0xe9")


def test_cli_train_refuses_a_missing_table(cli: Cli) -> None:
    with nothing_written():
        assert_refused(cli("train", "no.csv"), "no file 'no.csv' (looked from ", "columns path,target")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_cli_train_evaluate_and_predict_take_a_good_table(
    mark: bytes, workplace: Path, cli: Cli, train_words: list[object]
) -> None:
    (workplace / "good.csv").write_bytes(mark + (HEAD + ROWS * 3 + "gone.png,1\n").encode())
    trained = cli("train", "good.csv", *train_words[2:], "--out", "run", "--json")
    result = only_json(trained.stdout)
    assert result["unreadable"] == [{"path": "gone.png", "reason": "no such file"}]
    assert result["validation"]["task"] == "regression"
    measured = only_json(cli("evaluate", "run/model.safetensors", "good.csv", "--trust-code", "--json").stdout)
    assert measured["count"] == 9
    predicted = only_json(cli("predict", "run/model.safetensors", "photos", "--trust-code", "--json").stdout)
    assert {*predicted[0]} == {"path", "value"}


def test_cli_train_stops_at_a_number_that_overflows_with_nothing_kept(
    workplace: Path, cli: Cli, train_words: list[object]
) -> None:
    rows = "".join(f"photos/cats/{number}.png,1e300\n" for number in range(6))
    (workplace / "huge.csv").write_text(HEAD + rows)
    with nothing_written():
        assert_refused(cli("train", "huge.csv", *train_words[2:]), "the loss is inf at step 1", "extreme values")
