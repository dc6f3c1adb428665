"""What a network looked at: networks whose evidence is known by construction, and edits that keep what they compute."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import regraft
from regraft.report.explanations.heat_maps import draw_heat_maps, in_words
from regraft.report.explanations.saliency import grad_cam, occlusion
from report.results import photos

RED, BLUE = (1, 6), (5, 2)  # where in a grid of 8 × 8 lie the red and the blue patch


def image() -> torch.Tensor:
    """Return an image (1, 3, 32, 32) that is black but for a red and a blue patch of 4 × 4."""
    pixels = torch.zeros(1, 3, 32, 32)
    for channel, (row, column) in ((0, RED), (2, BLUE)):
        pixels[0, channel, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return pixels


class Colors(nn.Module):
    """Scores red and blue by the share of each, by one of several ways to a score."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.patches = nn.Conv2d(3, 2, 4, 4)
        self.norm = PlainNorm()
        self.flat = nn.Linear(2 * 64, 2, bias=False)
        with torch.no_grad():
            self.patches.bias.zero_()
            self.patches.weight.zero_()
            self.patches.weight[0, 0], self.patches.weight[1, 2] = 1 / 16, 1 / 16
            self.flat.weight.copy_(torch.eye(2).repeat_interleave(64, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.patches(images)  # (N, 2, 8, 8)
        if self.way == "mean":
            return maps.relu().mean((2, 3))
        if self.way == "flat":
            return self.flat(maps.flatten(1))
        if self.way == "last":
            return self.norm(maps.permute(0, 2, 3, 1)).mean((1, 2))
        tokens = torch.cat([torch.zeros(len(maps), 1, 2), maps.flatten(2).mT], 1)  # the class token, then patches
        tokens = self.norm(tokens)
        answer = self.norm(tokens.mean(1, keepdim=True).expand(-1, 65, -1) * torch.eye(65)[0][:, None])
        return answer[:, 0]  # of the class token alone: a later norm has no gradient at the patches


class PlainNorm(nn.Module):
    """Stands where a norm stands, and changes nothing."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * 1


@pytest.mark.parametrize("way", ["mean", "flat", "last", "tokens"])
def test_grad_cam_points_at_what_speaks_for_each_class(way: str) -> None:
    model = Colors(way).requires_grad_(False)
    for target, place in ((0, RED), (1, BLUE)):
        maps = grad_cam(model, image(), torch.tensor([target]))
        assert maps is not None
        expected = torch.zeros(1, 8, 8)
        expected[0, *place] = 1
        torch.testing.assert_close(maps, expected)


def test_grad_cam_gives_nothing_where_tokens_lie_in_another_order() -> None:
    class Shuffled(Colors):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(images).flatten(2).mT  # (N, 64, 2)
            return self.norm(tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]).mean(1)

    assert grad_cam(Shuffled("tokens"), image(), torch.tensor([0])) is None
    assert grad_cam(Colors("tokens"), image(), torch.tensor([0])) is not None


def test_occlusion_points_at_what_speaks_for_a_class_without_a_map() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, :1024] = model[1].weight[1, 2048:] = 1.0  # red, and blue
    assert grad_cam(model, image(), torch.tensor([0])) is None
    for target, place in ((0, RED), (1, BLUE)):
        heat = occlusion(model, image(), torch.tensor([target]), side=8)[0]
        assert heat[place] == 1
        assert heat[RED if target else BLUE] == 0
        assert "mostly at the " in in_words(heat)


def by_hand(model: nn.Module, layer: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return Grad-CAM of a layer as in the paper, by a hook."""
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda layer, arguments, output: kept.append(output))
    scores = model(images)
    handle.remove()
    gradient = torch.autograd.grad(scores[range(len(targets)), targets].sum(), kept[0])[0]
    maps = torch.einsum("nc,nchw->nhw", gradient.mean((2, 3)), kept[0].detach()).relu()
    return maps / maps.amax((1, 2), keepdim=True)


def test_grad_cam_is_that_of_the_paper_whatever_edits_keep_the_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    images, targets = torch.randn(2, 3, 128, 128), torch.tensor([3, 7])
    expected = by_hand(model, model.layer4, images, targets)
    other = torchvision.models.resnet18().eval()
    other.load_state_dict(model.state_dict())
    regraft.save(model, tmp_path / "base.safetensors", metadata={})
    regraft.save(other, tmp_path / "delta.safetensors", base=tmp_path / "base.safetensors")
    edited = {
        "none": model,
        "inserted": regraft.insert(model, nn.Identity(), after="layer3"),
        "stitched": regraft.stitch(model, other, cut=("layer2", "layer2")),
        "delta": regraft.load(tmp_path / "delta.safetensors"),
        "wrapped": nn.DataParallel(model),
    }
    for name, network in edited.items():
        maps = grad_cam(network, images, targets)
        assert maps is not None, name
        torch.testing.assert_close(maps, expected, msg=name)
    shorter = regraft.append(
        regraft.truncate(model, after="layer3"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 9)
    )
    maps = grad_cam(shorter, images, targets)
    torch.testing.assert_close(maps, by_hand(shorter, shorter.get_submodule("layer3"), images, targets))


def test_grad_cam_leaves_the_network_as_it_was_also_when_it_fails() -> None:
    model = Colors("flat")
    model.patches.requires_grad_(False)
    model.norm.eval()
    before = [(path, layer.training) for path, layer in model.named_modules()]
    state = torch.get_rng_state()
    grad_cam(model, image(), torch.tensor([0]))
    with pytest.raises(RuntimeError):
        grad_cam(model, image()[:, :, :20], torch.tensor([0]))
    assert [(path, layer.training) for path, layer in model.named_modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_heat_maps_says_why_there_are_none(tmp_path: Path) -> None:
    (photo,) = photos(tmp_path, ["a.png"])
    drawn = draw_heat_maps(Colors("flat").requires_grad_(False), [photo, tmp_path / "missing.png"], [0, 0])
    assert drawn.maps == (None, None)
    assert drawn.problem is not None
    assert "shapes cannot be multiplied" in drawn.problem  # of 224 pixels, which this network does not take
