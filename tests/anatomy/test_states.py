"""What the table says about frozen, pinned and moving layers, as text and as HTML."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn
from torchvision import models

import tiny
from regraft import audit, freeze, summary, unfreeze
from regraft.anatomy.mode_dependence import is_pinned
from regraft.anatomy.summary_table import state_text
from regraft.freezing.auditing import changes_while_training
from regraft.freezing.hold import HOLD, PinState


def states(model: nn.Module) -> dict[str, str]:
    return {layer.path: state_text(layer) for layer in summary(model).layers}


def test_summary_says_that_frozen_layers_are_pinned() -> None:
    model = tiny.build("plain")
    freeze(model, until="bn2")
    found = states(model)
    assert found["conv1"] == "frozen"
    assert found["bn1"] == found["bn2"] == "frozen, pinned"
    assert found["fc"] == "trainable"
    assert found[""] == "partly frozen"
    assert {layer.path for layer in summary(model).layers if layer.pinned} == {
        path for path, module in model.named_modules() if is_pinned(module)
    }
    unfreeze(model)
    assert not any("pinned" in state for state in states(model).values())


def test_summary_says_what_would_move_where_flags_alone_freeze() -> None:
    model = tiny.build("plain").requires_grad_(False)
    found = states(model)
    assert found["bn1"] == "frozen, but its running statistics would still move"
    assert found["dropout"] == "frozen, but it would still drop at random"
    moving = {layer.path for layer in summary(model).layers if layer.moves is not None}
    assert moving == {finding.path for finding in audit(model) if finding.kind == "unpinned"}
    freeze(model)
    assert all(layer.moves is None for layer in summary(model).layers)


def test_changes_while_training_agrees_with_the_pins_of_freeze() -> None:
    layer = nn.BatchNorm2d(3)
    PinState(pinned=True, hooks=HOLD).apply(layer)
    assert is_pinned(layer)
    assert changes_while_training(layer) is None
    PinState().apply(layer)
    assert changes_while_training(layer) == "its running statistics would still move"


@pytest.mark.parametrize("until", [None, "layer2", "fc"])
def test_summary_table_fits_a_screen(until: str | None) -> None:
    model = models.resnet18()
    if until:
        freeze(model, until=until)
    assert max(map(len, str(summary(model)).splitlines())) <= 120


class Tags(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_summary_html_is_a_tree_that_folds() -> None:
    model = models.resnet18()
    html = summary(model)._repr_html_()
    tags = parsed(html)
    containers = [module for module in model.modules() if list(module.children())]
    assert tags.seen.count("details") == tags.seen.count("summary") == len(containers)
    assert tags.seen.count("b") == len(list(model.modules()))
    assert html.count(" open>") == 1
    assert set(tags.seen) <= {"div", "details", "summary", "b", "span", "p"}


def test_summary_html_is_escaped() -> None:
    class Marked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    Marked.__name__ = "<mark>1</mark>"
    model = nn.Sequential()
    model.add_module("<u title=x>", Marked())
    tags = parsed(summary(model, (1, 2))._repr_html_())
    assert not {"mark", "u"} & set(tags.seen)
    assert "<mark>1</mark>" in "".join(tags.text)
