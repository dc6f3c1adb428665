"""The relative gradient norm against a formula written out here."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regraft.advice.gradients import measure_step, relative_gradient_norm
from regraft.training.steps.compute import ComputeContext


def test_relative_gradient_norm_is_that_of_surgical_fine_tuning() -> None:
    """For layer i: ‖∂L/∂θᵢ‖ / ‖θᵢ‖, of the mean loss over all photos (arXiv 2210.11466, section 4.1)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    model[0].requires_grad_(False)
    model.train()
    images, targets = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    context = ComputeContext(torch.device("cpu"))
    parts = list(zip(images.split(6), targets.split(6), strict=True))
    step = measure_step(model, parts, F.cross_entropy, ["2"], context)

    inputs, scores = images.double(), None
    conv, norm, head = model[0], model[1], model[4]
    tensors = [p.detach().double().requires_grad_() for p in model.parameters()]
    weight, bias, scale, shift, head_weight, head_bias = tensors
    hidden = F.conv2d(inputs, weight, bias)
    hidden = hidden / math.sqrt(1 + norm.eps) * scale[:, None, None] + shift[:, None, None]
    scores = hidden.relu().flatten(1) @ head_weight.T + head_bias
    loss = -scores.log_softmax(1)[torch.arange(12), targets].mean()
    gradients = torch.autograd.grad(loss, tensors)
    for names, group in (
        (["0.weight", "0.bias"], (0, 1)),
        (["1.weight", "1.bias"], (2, 3)),
        (["4.weight", "4.bias"], (4, 5)),
    ):
        gradient = math.sqrt(sum(float(gradients[i].square().sum()) for i in group))
        size = math.sqrt(sum(float(tensors[i].detach().square().sum()) for i in group))
        assert relative_gradient_norm(step.gradients, model, names) == pytest.approx(gradient / size, rel=1e-6)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not conv._forward_hooks
    assert head.weight.grad is None
    assert 0 < step.seconds["2"] < step.whole_s
