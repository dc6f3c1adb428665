import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from oracles import identical, same, snapshot
from regraft import freeze
from regraft.errors import LossError, ModelError
from regraft.training.loop import main_output, score, train_epoch
from regraft.training.steps.compute import ComputeContext, choose_compute

CPU = ComputeContext(torch.device("cpu"))


def batches(name: str, count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(tiny.batch(name, 5, seed), torch.arange(5) % tiny.CLASSES) for seed in range(count)]


def run(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]], loss: object = F.cross_entropy) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return train_epoch(model, data, loss, optimizer, schedule, CPU.scaler(), CPU)


@pytest.mark.parametrize("frozen", [None, "children[:1]"])
@pytest.mark.parametrize("name", ["plain", "residual", "root-token", "tied", "functional-dropout", "aux-head"])
def test_train_epoch_equals_a_loop_by_hand_bit_for_bit(name: str, frozen: str | None) -> None:
    model = tiny.build(name)
    if frozen is not None:
        freeze(model, frozen)
    by_hand, data = copy.deepcopy(model), batches(name)

    torch.manual_seed(11)
    ours = run(model, data)
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW([p for p in by_hand.parameters() if p.requires_grad], lr=1e-2)
    by_hand.train()
    losses = []
    for step, (inputs, targets) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        output = by_hand(inputs)
        loss = F.cross_entropy(output[0] if isinstance(output, tuple) else output, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert ours == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert all(identical(t, by_hand.state_dict()[key]) for key, t in model.state_dict().items())


def test_train_epoch_weighs_photos_and_not_batches_in_the_mean_loss() -> None:
    model = nn.Linear(12, tiny.CLASSES)
    uneven = [(torch.randn(size, 12), torch.zeros(size, dtype=torch.long)) for size in (1, 7)]
    losses = iter([torch.tensor(8.0), torch.tensor(0.0)])
    assert run(model, uneven, lambda outputs, _: next(losses) + 0 * outputs.sum()) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_train_epoch_stops_before_the_step_at_a_loss_that_is_not_finite(bad: float) -> None:
    model, calls = nn.Linear(12, tiny.CLASSES), []
    states = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        states.append(model.weight.detach().clone())
        return outputs.sum() * (bad if len(calls) == 2 else 0.1)

    with pytest.raises(LossError, match=rf"the loss is -?{bad} at step 2 of this epoch \(learning rate 0.005\)"):
        run(model, batches("tied"), loss)
    assert identical(model.weight, states[1])


@pytest.mark.parametrize("name", ["plain", "root-token", "aux-head", "functional-dropout"])
def test_score_equals_a_forward_by_hand_and_changes_nothing(name: str) -> None:
    model, data = tiny.build(name), batches(name)
    next(model.children()).eval()
    before = snapshot(model)
    outputs, targets = score(model, data, CPU)
    assert same(before, snapshot(model))
    reference = copy.deepcopy(model).eval()
    with torch.inference_mode():
        expected = torch.cat([reference(inputs) for inputs, _ in data])
    assert identical(outputs, expected)
    assert torch.equal(targets, torch.cat([targets for _, targets in data]))
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.zeros(2, 3)),
        [torch.ones(2, 3)],
        tiny.AuxOutputs(torch.ones(2, 3), torch.zeros(2, 3)),
        {"loss": 1, "logits": torch.ones(2, 3)},
        SimpleNamespace(logits=torch.ones(2, 3)),
    ],
)
def test_main_output_finds_scores_in_whatever_a_model_returns(output: object) -> None:
    assert torch.equal(main_output(output), torch.ones(2, 3))


@pytest.mark.parametrize("output", [None, (), {"out": torch.ones(1)}, 3.0, ("text",)])
def test_main_output_refuses_anything_else(output: object) -> None:
    with pytest.raises(ModelError, match=f"the model returned a {type(output).__name__}, expected a tensor of scores"):
        main_output(output)


def test_score_in_mixed_precision_is_torchs_autocast() -> None:
    compute, model, data = choose_compute("cpu", "bf16"), nn.Linear(12, 3), batches("tied", 1)
    outputs, _ = score(model, data, compute)
    with torch.autocast("cpu", torch.bfloat16):
        assert identical(outputs, model(data[0][0]).float())
    assert not compute.scaler().is_enabled()


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "mps:x"])
def test_choose_compute_refuses_a_device_that_does_not_exist(device: str) -> None:
    with pytest.raises(ModelError, match=f"the device '{device}' cannot be used: .*Try device='cpu'"):
        choose_compute(device, "auto")


def test_train_epoch_mixes_as_the_paper_of_mixup_says() -> None:
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(6, 3), torch.randn(8, 6), torch.arange(8) % 3
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    compute = choose_compute("cpu", "fp32")
    torch.manual_seed(5)
    found = train_epoch(
        model, [(inputs, targets)], F.cross_entropy, optimizer, schedule, compute.scaler(), compute, mixup=0.4
    )
    torch.manual_seed(5)
    share = torch.distributions.Beta(0.4, 0.4).sample()
    order = torch.randperm(8)
    scores = by_hand(share * inputs + (1 - share) * inputs[order])
    loss = share * F.cross_entropy(scores, targets) + (1 - share) * F.cross_entropy(scores, targets[order])
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-5)
    assert by_hand.weight.grad is not None
    expected = by_hand.weight - 0.1 * by_hand.weight.grad
    assert torch.allclose(model.weight, expected, atol=1e-6)
