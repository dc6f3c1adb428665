"""What people see in a terminal: words and paths whole at every width, and little by default."""

import re
import shutil
import sys

import pytest
from terminal import Screen, run_on_terminal

from regraft.console import LABEL
from scene import TINY_NET, write_folder

CHECKPOINT = "runs/photos-1/model.safetensors"
LONG = "a_photo_with_a_name_that_leaves_no_room_for_other_columns_on_a_screen_of_eighty_of_them.png"
NET = ["--model", "py:tiny_net.py:TinyNet", "--trust-code"]
OUT = ["--out", "runs/photos-1", "--overwrite"]
COMMANDS = {
    "train": [
        "train",
        "photos",
        *NET,
        *[
            "--weights",
            "none",
            "--freeze",
            "conv",
            "--epochs",
            "6",
            "--batch-size",
            "4",
            "--decoder",
            "pillow",
        ],
        *OUT,
    ],
    "predict": ["predict", CHECKPOINT, "photos/dogs/0.png", LONG, "--trust-code"],
    "evaluate": ["evaluate", CHECKPOINT, "photos", "--trust-code"],
    "inspect": ["inspect", CHECKPOINT, "--trust-code"],
    "wrong choice": ["train", "photos", "--augment", "flips"],
    "wrong file": ["predict", "no/such/folder/that/has/a/long/name/and/another/one/model.safetensors", "photos"],
    "help": ["train", "--help"],
}
TRAIN_80 = """\
photos     20 in 2 classes: cats 10, dogs 10
           16 for training, 4 for validation (20% of each class kept for
           validation, drawn with seed 0)
decoder    Pillow
model      py:tiny_net.py:TinyNet, untrained
training   norm, fc (34 of 250 numbers); the rest is frozen
           6 epochs, on cpu
epoch 1/6  accuracy #### (# of 4)  best so far …
epoch 2/6  accuracy #### (# of 4)  best so far …
epoch 4/6  accuracy #### (# of 4)  best so far …
epoch 6/6  accuracy #### (# of 4)  best so far …

result     accuracy #### (# of 4), after epoch #
           on 4 photos held back; expect #% to #% on others like them
model      runs/photos-1/model.safetensors
report     runs/photos-1/report.html
next       regraft predict runs/photos-1/model.safetensors PHOTO.jpg \\
           --trust-code"""
TRAIN_100 = TRAIN_80.replace(
    "kept for\n           validation, drawn with seed 0", "kept for validation, drawn with seed\n           0"
)
TRAIN_100 = TRAIN_100.replace("PHOTO.jpg \\\n           --trust-code", "PHOTO.jpg --trust-code")
PREDICT = f"""\
path               label  probability  next
photos/dogs/0.png  ####         #####  #### #####
{LONG}
                   ####         #####  #### #####"""
WRONG_CHOICE_80 = """\
error: --augment cannot be 'flips': expected one of none, flip, standard,
       trivial. Nearest: 'flip'.
exit code 2"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudoterminals")


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """Run all commands at all widths, in one process."""
    folder = tmp_path_factory.mktemp("terminal")
    write_folder(folder / "photos", count=10)
    (folder / "tiny_net.py").write_text(TINY_NET)
    shutil.copy(folder / "photos/cats/0.png", folder / LONG)
    runs = [(columns, name) for columns in (80, 100, 60, 400) for name in COMMANDS]
    texts = run_on_terminal([(columns, COMMANDS[name]) for columns, name in runs], folder)
    return dict(zip(runs, texts, strict=True))


def without_figures(text: str) -> str:
    """Hide what depends on the arithmetic of the machine."""
    text = re.sub(r"accuracy \d\.\d{4} \(\d of", "accuracy #### (# of", text)
    text = re.sub(r"after epoch \d", "after epoch #", text)
    text = re.sub(r"best so far(: epoch \d)?$", "best so far …", text, flags=re.MULTILINE)
    text = re.sub(r"expect \d+% to \d+%", "expect #% to #%", text)
    return re.sub(r"(cats|dogs)( +)\d\.\d{3}(  )(cats|dogs) \d\.\d{3}", r"####\2#####\3#### #####", text)


def test_cli_train_on_a_terminal_of_80_and_100_columns(screens: dict[tuple[int, str], str]) -> None:
    assert without_figures(screens[80, "train"]) == TRAIN_80
    assert without_figures(screens[100, "train"]) == TRAIN_100


def test_cli_predict_on_a_terminal_keeps_long_paths_whole(screens: dict[tuple[int, str], str]) -> None:
    assert without_figures(screens[100, "predict"]) == PREDICT
    *rest, first, second, last = without_figures(screens[80, "predict"]).splitlines()
    assert first + second == LONG  # longer than the screen, and written in one piece
    assert [*rest, first + second, last] == PREDICT.splitlines()


def test_cli_error_on_a_terminal_is_broken_between_words(screens: dict[tuple[int, str], str]) -> None:
    assert screens[80, "wrong choice"] == WRONG_CHOICE_80


@pytest.mark.parametrize("columns", [80, 100, 60])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "predict"])
def test_cli_breaks_no_word_on_a_terminal(name: str, columns: int, screens: dict[tuple[int, str], str]) -> None:
    whole = set(screens[400, name].split())
    too_long = [word for word in whole if len(word) + LABEL > columns]  # written in one piece, wherever the screen ends
    short = re.compile(r"\\|[\d.]+|[kMG]|params|mult-adds|x>=\d+|-+")  # numbers of tables that are rounded to fit
    strange = {word for word in screens[columns, name].split() if word not in whole and not short.fullmatch(word)}
    assert {word for word in strange if not any(word in long for long in too_long)} == set()


def test_terminal_of_the_tests_breaks_words_where_a_line_is_full() -> None:
    screen = Screen(10)
    screen.show("one three four\r\n\x1b[2Ktwo\x1b[1A\r\x1b[2Kfive")
    assert screen.text() == "one three\nfive\ntwo"
