"""How results show themselves in a session: a dozen lines of 80 columns at most, and escaped HTML."""

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import regraft
from regraft.card import Step
from regraft.display import WIDTH, block, some
from regraft.training.metrics import measure

MAX_LINES = 12
NASTY = "<script>alert('1')</script>\x1b[31m & " + "long" * 30


class Tags(HTMLParser):
    """Collects the tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)


def network(width: int = 60) -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(width)], nn.Linear(4, 3))


def values(folder: Any) -> Iterator[Any]:
    """Yield a large value of every kind that a session may show."""
    model = network()
    yield regraft.freeze(model, "children[:30]", "params:*.0.bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for layer in model[40:50]:
        layer.requires_grad_(False)
        next(layer.parameters()).grad = torch.zeros(4, 4)
    yield regraft.audit(model, optimizer)
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    small = network(1)
    result = regraft.fit(small, (data, data), epochs=40, batch_size=4, lr=1e-3, out=folder / "out", progress=False)
    yield from (result, result.plan, result.config, result.validation, result.history[0])
    yield measure(torch.randn(300, 120), torch.arange(300) % 120, [f"{NASTY} {i}" for i in range(120)])
    saved = regraft.save(model, folder / "a.safetensors")
    other = nn.Sequential(*list(network())[::2], nn.Linear(4, 3))
    yield regraft.load_weights(other, saved, min_share=0, accept="certain", dry_run=True)
    yield regraft.diff(model, network())
    regraft.freeze(small, "0")
    yield regraft.partition(small, torch.zeros(2, 4))
    yield regraft.Schedule.parse("head:3,layer4+'re:a,b':5,all:10")
    yield regraft.Plan(source=NASTY, edits=[Step(operation="truncate", arguments={"drop": 1})] * 60)


@pytest.mark.filterwarnings("ignore")  # of a load that leaves most as it is
def test_display_of_every_value_is_short_and_its_html_escaped(tmp_path: Any) -> None:
    for value in values(tmp_path):
        lines = repr(value).splitlines()
        assert len(lines) <= MAX_LINES, repr(value)
        assert max(map(len, lines)) <= WIDTH or len(lines) == 1, repr(value)
        assert all(line.isprintable() for line in lines)
        assert lines[0].startswith(type(value).__name__)
        if hasattr(value, "_repr_html_"):
            assert Tags(value._repr_html_()).tags <= {"p", "b", "br", "table", "thead", "tbody", "tr", "th", "td"}


def test_freeze_report_shows_the_top_level_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    report = regraft.freeze(model, "0", "1", "2.0")
    assert repr(report) == (
        "FreezeReport: 48 of 58 parameters frozen (82.8 %)\n"
        "  frozen   0, 1\n"
        "  partly   2\n"
        "  changed  6 tensors: 0.weight, 0.bias, 1.weight, …\n"
        "  pinned   1 layers: 1"
    )
    assert "<tr><td>2</td><td>partly</td><td>20</td><td>30</td></tr>" in report._repr_html_()


def test_audit_shows_findings_by_kind_with_counts_and_how_to_mend_them() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.requires_grad_(False)
    findings = regraft.audit(model, optimizer)
    assert isinstance(findings, list)
    assert repr(findings) == (
        "Findings: 6\n"
        "  frozen-in-optimizer  6: 0.weight, 0.bias, 1.weight, … is frozen, but in the\n"
        "                       optimizer.\n"
        "                       -> Build the optimizer again:\n"
        "                       regraft.build_optimizer(...)."
    )
    assert {kind: len(of_kind) for kind, of_kind in findings.by_kind.items()} == {"frozen-in-optimizer": 6}
    assert regraft.audit(nn.Linear(2, 2)) == []
    assert repr(regraft.audit(nn.Linear(2, 2))) == "Findings: none"


def test_fit_result_shows_the_headline_and_where_the_model_is(tmp_path: Any) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    result = regraft.fit(network(1), (data, data), epochs=20, lr=1e-3, out=tmp_path / "o", progress=False)
    first, *rest = repr(result).splitlines()
    assert first == f"FitResult: {result.validation.headline()} in the best epoch, {result.best_epoch} of 20"
    assert any(line.startswith("  saved") for line in rest)
    html = result._repr_html_()
    assert html.count("<tr>") == 13  # a header, eleven epochs, and how many are left out
    assert "… 9 more" in html
    assert str(result.checkpoint) in html


def test_schedule_and_train_config_show_what_makes_them_again() -> None:
    schedule = regraft.Schedule.parse("head:3,layer4+'re:a,b':5,all:10")
    assert eval(repr(schedule), {"Schedule": regraft.Schedule}) == schedule
    config = regraft.TrainConfig(epochs=3, lr=0.5, freeze=("a",))
    assert repr(config) == "TrainConfig(freeze=('a',), epochs=3, lr=0.5)"


def test_block_wraps_to_two_lines_a_row_and_leaves_out_empty_ones() -> None:
    text = block("T", [("a", "word " * 100), ("b", ""), ("c", "x\ny")])
    assert [line[:6] for line in text.splitlines()] == ["T", "  a  w", "     w", "  c  x"]
    assert block("T", [("a", "word " * 100)] * 9).splitlines()[11:] == ["  …"]
    assert some(["a", "b"], 2) == "a, b"
