import pytest
from torch import nn

import tiny
from regraft.anatomy.paths import layer_at, parent_and_name
from regraft.errors import SelectionError


def test_layer_at_the_empty_path_is_the_model_itself() -> None:
    model = tiny.build("residual")
    assert layer_at(model, "") is model
    assert layer_at(model, "body.second") is model.get_submodule("body.second")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("convl", "no layer 'convl' in PlainCnn. Nearest: 'conv2', 'conv1'. `regraft inspect` lists all."),
        ("zzzz", "Its top-level layers: conv1, bn1, conv2, bn2, dropout, fc."),
    ],
)
def test_layer_at_an_unknown_path_answers_with_the_nearest_names(path: str, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        layer_at(tiny.build("plain"), path)
    assert message in str(caught.value)


def test_parent_and_name_split_at_the_last_dot() -> None:
    assert parent_and_name("a.b.c") == ("a.b", "c")


def test_layer_at_names_some_of_many_layers_in_its_message() -> None:
    model = nn.Sequential(*(nn.Identity() for _ in range(2000)))
    with pytest.raises(SelectionError, match="29 and 1970 more") as caught:
        layer_at(model, "qqq")
    assert len(str(caught.value)) < 300
