"""What goes wrong silently is found, is found only then, and is gone when the stated fix is carried out."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import regraft
import tiny
from freezing.layers_with_state import Case
from freezing.provoked import PROVOKED, half_frozen, sgd, unpinned
from oracles import same, snapshot
from regraft import audit, freeze, unfreeze
from regraft.card import attach
from regraft.errors import ModelError
from regraft.freezing.auditing import Finding

BY_NAME = pytest.mark.parametrize("name", PROVOKED)


@BY_NAME
def test_audit_finds_each_fault_and_nothing_else(name: str) -> None:
    provoke, kind, path, words = PROVOKED[name]
    (finding,) = audit(*provoke())
    assert (finding.kind, finding.path) == (kind, path)
    assert words in finding.problem
    assert str(finding) == f"{path}: {finding.problem} {finding.fix}"


@BY_NAME
def test_audit_states_a_fix_that_removes_the_finding_and_thaws_or_freezes_nothing_else(name: str) -> None:
    provoke, kind, _, _ = PROVOKED[name]
    model, optimizer = provoke()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    (finding,) = audit(model, optimizer)
    model, optimizer = carried_out(finding, model, optimizer)
    assert audit(model, optimizer) == []
    if kind != "broken-statistics":
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def carried_out(finding: Finding, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Case:
    """Do what a finding says: run the code in its text, or what stands there in words."""
    if finding.fix.startswith("Build the optimizer again: regraft.build_optimizer"):
        return model, sgd(model)
    if finding.fix.endswith("or thaw the layer and train it."):
        unfreeze(model, finding.path.rpartition(".")[0])
        return model, optimizer
    code = re.fullmatch(r"(?:Call|Use|Set) (.+?)(?:, which .*)?\.", finding.fix)
    assert code is not None, finding.fix
    names = {"regraft": regraft, "model": model}
    exec(code[1], names)
    return names["model"], optimizer


@pytest.mark.parametrize("name", tiny.ALL)
@pytest.mark.parametrize("patterns", [None, (), ("children[:1]",), ("children[:2]",)], ids=["no", "all", "1", "2"])
def test_audit_finds_nothing_in_a_model_that_freeze_froze(name: str, patterns: tuple[str, ...] | None) -> None:
    model = tiny.build(name).train()
    model(tiny.batch(name))
    if patterns == ("children[:1]",) and next(next(model.children()).parameters(), None) is None:
        pytest.skip("its first layer has no parameters, so there is nothing to freeze")
    if patterns is not None:
        freeze(model, *patterns)
    optimizer = None if patterns == () else sgd(model)
    assert audit(model.train(), optimizer) == []


@BY_NAME
def test_audit_changes_nothing(name: str) -> None:
    model, optimizer = PROVOKED[name][0]()
    before = snapshot(model)
    groups = None if optimizer is None else [list(map(id, group["params"])) for group in optimizer.param_groups]
    audit(model, optimizer)
    assert same(before, snapshot(model))
    assert groups is None or [list(map(id, group["params"])) for group in optimizer.param_groups] == groups


def test_audit_tells_parameters_apart_by_identity_and_not_by_value() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in model:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD([model[0].weight, model[0].bias, model[1].weight], lr=0.1)
    assert [(finding.kind, finding.path) for finding in audit(model, optimizer)] == [
        ("missing-from-optimizer", "1.bias")
    ]


@pytest.mark.parametrize(("value", "found"), [("-inf", []), ("nan", ["broken-statistics"])])
def test_audit_takes_an_infinite_mask_as_sound_and_nan_not(value: str, found: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_buffer("mask", torch.full((3, 3), float(value)).triu(1))
    freeze(model, "0")
    assert [finding.kind for finding in audit(model)] == found


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_audit_finds_statistics_that_are_not_finite(value: str) -> None:
    model = half_frozen()
    model.bn1.running_mean[0] = float(value)
    assert [finding.path for finding in audit(model)] == ["bn1.running_mean"]


def test_audit_takes_a_shared_weight_as_one_parameter() -> None:
    model = tiny.build("tied")
    assert audit(model, sgd(model)) == []


def test_audit_takes_the_optimizer_of_a_copy_as_one_of_another_model() -> None:
    model = tiny.build("plain")
    kinds = {finding.kind for finding in audit(copy.deepcopy(model), sgd(model))}
    assert kinds == {"not-of-this-model", "missing-from-optimizer"}


def test_audit_says_that_a_frozen_parameter_with_momentum_moves() -> None:
    model = tiny.build("plain")
    optimizer = sgd(model)
    model.train()(tiny.batch("plain")).sum().backward()
    optimizer.step()
    freeze(model, "conv1")
    (finding,) = audit(model, optimizer)
    assert "momentum or weight decay may still move it" in finding.problem


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LayerNorm(4),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)),
        nn.LSTM(4, 4),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_audit_asks_no_pin_of_frozen_layers_that_neither_move_nor_draw(layer: nn.Module) -> None:
    model, _ = unpinned(layer)()
    assert audit(model) == []


@pytest.mark.parametrize(
    ("make", "classes"), [(lambda: tiny.build("plain"), tiny.CLASSES), (lambda: tiny.build("residual"), tiny.CLASSES)]
)
def test_audit_finds_nothing_in_a_head_that_fits_its_classes(make: Callable[[], nn.Module], classes: int) -> None:
    assert audit(attach(make(), classes=tuple(map(str, range(classes))))) == []


def test_audit_takes_the_layer_that_runs_last_as_the_head_and_not_the_last_registered() -> None:
    model = attach(tiny.build("residual"), classes=("cat", "dog"))
    (finding,) = audit(model)
    assert finding.path == "head"


# ---- flags set by hand, followed at the next change of mode


# ---- with inputs: one step of training on a copy


class Cut(nn.Module):
    """Has layers that no gradient reaches, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.behind_no_grad, self.detached, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.behind_no_grad(x)
        return self.head(x + self.detached(x).detach())


def test_audit_with_inputs_finds_what_gets_no_gradient() -> None:
    model = Cut()
    before = snapshot(model)
    findings = audit(model, inputs=torch.randn(3, 4))
    assert {(f.kind, f.path.partition(".")[0]) for f in findings} == {
        ("no-gradient", "behind_no_grad"),
        ("no-gradient", "detached"),
        ("no-gradient", "unused"),
    }
    assert "gets no gradient in a training step" in str(findings[0])
    assert same(before, snapshot(model))
    for finding in findings:
        model, _ = carried_out(Finding("", "", "", finding.fix.replace("), or let", "), which").strip()), model, None)
    assert audit(model, inputs=torch.randn(3, 4)) == []


class Teacher(nn.Module):
    """Moves the frozen weights of one part in the forward of another, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.teacher.weight.data.lerp_(self.student.weight.data, 0.1)
        return self.student(x) - self.teacher(x)


def test_audit_with_inputs_finds_frozen_weights_that_a_forward_writes_to() -> None:
    model = Teacher()
    freeze(model, "teacher")
    before = snapshot(model)
    (finding,) = audit(model, inputs=(torch.randn(3, 4),))
    assert (finding.kind, finding.path) == ("moved", "teacher.weight")
    assert "is frozen, but a forward in .train() changed it" in str(finding)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", tiny.ALL)
@pytest.mark.parametrize("patterns", [(), ("children[:2]",)], ids=["none", "two"])
def test_audit_with_inputs_finds_nothing_in_sound_networks(name: str, patterns: tuple[str, ...]) -> None:
    model = tiny.build(name)
    if patterns:
        freeze(model, *patterns)
    assert audit(model, inputs=tiny.batch(name)) == []


def test_audit_with_inputs_that_cannot_be_trained_on_says_so(random_state: Callable[[], object]) -> None:
    state = random_state()
    with pytest.raises(ModelError, match=r"BatchNorm1d cannot be audited by a training step.*Expected more than 1"):
        audit(nn.BatchNorm1d(3), inputs=torch.randn(1, 3, generator=torch.Generator().manual_seed(0)))
    assert random_state() == state
