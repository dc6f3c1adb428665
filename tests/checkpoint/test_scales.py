"""Weights of eight bits mean their numbers times a scale that lies beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from oracles import same, snapshot
from regraft import load_weights
from regraft.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
EIGHT = torch.float8_e4m3fn


def trained() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 192)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 192), nn.Linear(192, 3))


def stored(numbers: torch.Tensor, **beside: torch.Tensor) -> Tensors:
    """Return a file's tensors: the stored numbers, what lies beside them, and the second layer as it is."""
    layer = {f"0.{name}": tensor.contiguous() for name, tensor in beside.items()}
    head = {f"1.{name}": tensor.detach().clone() for name, tensor in network()[1].state_dict().items()}
    return {"0.weight": numbers, "0.bias": trained().bias.detach().clone(), **layer, **head}


WEIGHT = trained().weight.detach()
WHOLE = WEIGHT.abs().max() / 448
ROWS = WEIGHT.abs().amax(1, keepdim=True) / 448
GROUPS = WEIGHT.reshape(192, 2, 32).abs().amax(2) / 448
BLOCKS = torch.stack([WEIGHT[:128].abs().max(), WEIGHT[128:].abs().max()]).reshape(2, 1) / 448
INT_ROWS = WEIGHT.abs().amax(1, keepdim=True) / 127
INTS = (WEIGHT / INT_ROWS).round().to(torch.int8)
BLOCKED = (WEIGHT / BLOCKS.repeat_interleave(128, 0)[:192]).to(EIGHT)
EXPONENTS = torch.full((192, 2), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 2⁻⁷

SCALED: dict[str, Tensors] = {
    **{
        name: stored((WEIGHT / WHOLE).to(EIGHT), **{name: WHOLE.reshape(1).clone(), "input_scale": torch.ones(1)})
        for name in ("weight_scale", "weight_scale_inv", "scale_weight", "scale", "weight_scales")
    },
    "e5m2": stored((WEIGHT / WHOLE).to(torch.float8_e5m2), weight_scale=WHOLE.reshape(())),
    "rows": stored((WEIGHT / ROWS).to(EIGHT), weight_scale=ROWS),
    "rows in a line": stored((WEIGHT / ROWS).to(EIGHT), weight_scale=ROWS[:, 0]),
    "groups": stored((WEIGHT / GROUPS.repeat_interleave(32, 1)).to(EIGHT), weight_scale=GROUPS),
    "blocks of 128": stored(BLOCKED, weight_scale_inv=BLOCKS),
    "exponents": stored((WEIGHT * 128).to(EIGHT), weight_scale=EXPONENTS),
    "whole numbers": stored(INTS, weight_scale=INT_ROWS),
    "zero point": stored(
        (INTS.float() + 7).clamp(-128, 127).to(torch.int8),
        weight_scale=INT_ROWS,
        weight_zero_point=torch.full((192, 1), 7, dtype=torch.int8),
    ),
    "bitsandbytes": stored(INTS, SCB=INT_ROWS[:, 0] * 127, weight_format=torch.tensor(0, dtype=torch.uint8)),
}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "wrapped"])
def test_load_weights_multiplies_with_the_scale(case: str, prefix: str, tmp_path: Path) -> None:
    save_file({prefix + name: tensor for name, tensor in SCALED[case].items()}, tmp_path / "w.safetensors")
    model = network()
    report = load_weights(model, tmp_path / "w.safetensors", strict=True)
    error = ((model[0].weight - WEIGHT).norm() / WEIGHT.norm()).item()
    assert error < (0.06 if case == "e5m2" else 0.03)
    assert torch.equal(model[0].bias, trained().bias)
    assert "1 weights in" in report.headline()
    assert "multiplied with their scales" in report.headline()


def quanto() -> Tensors:
    tensors = stored(INTS)
    tensors["0.weight._data"], tensors["0.weight._scale"] = tensors.pop("0.weight"), INT_ROWS
    return tensors


def test_load_weights_multiplies_what_optimum_quanto_wrote(tmp_path: Path) -> None:
    save_file(quanto(), tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors", strict=True)
    assert torch.equal(model[0].weight, INTS * INT_ROWS)


INDEX, BYTE = torch.zeros(8, 192, dtype=torch.int32), torch.zeros(192, 32, dtype=torch.uint8)
REFUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "unknown name": (lambda: stored((WEIGHT / WHOLE).to(EIGHT), weight_amax=WHOLE.reshape(1)), "'0.weight_amax' shows"),
    "odd name": (lambda: stored((WEIGHT / WHOLE).to(EIGHT), sc=WHOLE.reshape(1)), "a scheme that is not known"),
    "blocks of two sizes": (lambda: stored(BLOCKED, weight_scale=BLOCKS), "nor blocks of it without doubt"),
    "inputs": (lambda: stored((WEIGHT / WHOLE).to(EIGHT), weight_scale=torch.ones(64)), "fits neither the whole"),
    "exponents in bytes": (
        lambda: stored(WEIGHT.to(EIGHT), weight_scale=torch.full((192, 2), 127, dtype=torch.uint8)),
        "a scale in uint8",
    ),
    "GPTQ": (lambda: stored(WEIGHT, qweight=INDEX, qzeros=INDEX, scales=ROWS, g_idx=INDEX[0]), "(GPTQ)"),
    "AWQ": (lambda: stored(WEIGHT, qweight=INDEX, qzeros=INDEX, scales=ROWS), "(AWQ)"),
    "NF4": (
        lambda: stored(BYTE, **{"weight.absmax": ROWS, "weight.quant_state.bitsandbytes__nf4": BYTE[0]}),
        "(bitsandbytes, 4 bits (nf4))",
    ),
    "MXFP4": (lambda: stored(WEIGHT, up_blocks=BYTE, up_scales=BYTE), "(MXFP4)"),
    "NVFP4": (lambda: stored(BYTE, weight_scale=GROUPS.to(EIGHT), weight_scale_2=torch.ones(1)), "(NVFP4)"),
    "HQQ": (lambda: stored(WEIGHT, W_q=BYTE), "(HQQ)"),
    "packed": (lambda: stored(WEIGHT, weight_packed=INDEX, weight_scale=ROWS), "(compressed-tensors, packed)"),
    "one lacks its scale": (
        lambda: {
            **stored((WEIGHT / WHOLE).to(EIGHT), weight_scale=WHOLE.reshape(1)),
            "1.weight": torch.ones(3, 192).to(EIGHT),
        },
        "has no scale for '1.weight' (float8_e4m3fn)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_weights_refuses_other_schemes_by_name(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    save_file({name: tensor.clone() for name, tensor in make().items()}, tmp_path / "w.safetensors")
    model = network()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "w.safetensors")
    assert message in str(caught.value)
    assert str(caught.value).endswith("Nothing was changed.")
    assert same(before, snapshot(model))


def test_load_weights_takes_eight_bits_without_any_scale_as_they_are(tmp_path: Path) -> None:
    save_file(stored(WEIGHT.to(EIGHT)), tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors", strict=True)
    assert torch.equal(model[0].weight, WEIGHT.to(EIGHT).float())


class Eight(nn.Module):
    """A layer that keeps eight bits and the scale itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(192, 64).to(EIGHT))
        self.register_buffer("weight_scale", torch.zeros(1))


def test_load_weights_leaves_the_scale_to_a_model_that_keeps_it(tmp_path: Path) -> None:
    numbers = (WEIGHT / WHOLE).to(EIGHT)
    save_file({"weight": numbers, "weight_scale": WHOLE.reshape(1).clone()}, tmp_path / "w.safetensors")
    model = Eight()
    load_weights(model, tmp_path / "w.safetensors", strict=True)
    assert torch.equal(model.state_dict()["weight"].view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(model.state_dict()["weight_scale"], WHOLE.reshape(1))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_load_weights_names_torch_ao_where_it_quantized(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)
    torch.save({"0.weight": tensor}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"holds quantized weights \(torch.ao, qint8\).* Call dequantize\(\)"):
        load_weights(network(), tmp_path / "w.pth")
