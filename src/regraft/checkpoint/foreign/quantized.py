"""Dequantize weights that are stored in eight bits with a scale; refuse other quantization schemes by name.

An eight-bit weight means its number times a scale, which is another tensor of the file. Loaded without its scale, it is
wrong by orders of magnitude, with the right name and shape. So every tensor next to an eight-bit weight must be
explained: it is a scale whose shape says what it scales, or belongs to activations; otherwise the file is refused.

Sources: the layouts of compressed-tensors and vLLM (`weight_scale`, `weight_zero_point`), DeepSeek-V3
(`weight_scale_inv`, blocks of 128 × 128, a factor in spite of its name), ComfyUI (`scale_weight`),
bitsandbytes' LLM.int8 (`SCB`, the largest value of each row, which 127 stands for) and optimum-quanto (`_data`,
`_scale`).
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from regraft.checkpoint.foreign.state_dicts import Tensors
from regraft.errors import CheckpointError

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
WHOLE = (torch.int8, torch.uint8)
BLOCK = 128  # side of the blocks of `weight_scale_inv`
SCALES = ("{name}_scale", "{name}_scale_inv", "{name}.scale", "{name}_scales", "{parent}scale_{last}", "{parent}scale",
          "{parent}scales", "{parent}scale_inv")  # fmt: skip
ZERO_POINTS = ("{name}_zero_point", "{name}.zero_point", "{parent}zero_point", "{parent}zero_points")
ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|act|activation|k|v|q|kv)_?(scale|zero_point|amax)|scale_(input|output)$|_amax_history$"
)
BLOCKS_OF_128 = ("_scale_inv", "scale_inv")
ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta")
PLAIN = re.compile(r"bias|weight$|norm|mean|var$|gamma|beta|embed|token")  # usual parameters of a layer
SUSPECT = re.compile(r"scale|zero|absmax|amax|quant|codebook|SCB|(^|[._])(lut|qmap|nf4|fp4)", re.IGNORECASE)
MARKERS = ("scaled_fp8",)  # of ComfyUI: the file has scales
FORMAT = "weight_format"  # of bitsandbytes: 0 means rows in their usual order

SCHEMES: tuple[tuple[str, str], ...] = (  # (ending of a name, scheme with such names); the first match counts
    (r"\.quant_state\.bitsandbytes__(\w+)$", r"bitsandbytes, 4 bits (\1)"),
    (r"\.(weight\.)?(absmax|quant_map|nested_absmax)$", "bitsandbytes, 4 bits"),
    (r"\.qweight$", ""),  # of GPTQ or AWQ
    (r"_blocks$", "MXFP4"),
    (r"\.weight_packed$", "compressed-tensors, packed"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.W_q$", "HQQ"),
    (r"\.codebooks$", "AQLM"),
    (r"\.Qidxs$", "QuIP#"),
    (r"_packed_params(\._packed_params)?$", "torch.ao"),
    (r"\._data\._data$", "optimum-quanto, packed"),
)


@dataclass(frozen=True)
class Scaled:
    """The names of an eight-bit weight and of its scale.

    Attributes:
        name: Name of the dequantized weight.
        data: Name of the stored numbers in the file.
        scale: Name of the scale in the file.
        zero_point: Name of the zero point in the file; empty where there is none.
    """

    name: str
    data: str
    scale: str
    zero_point: str = ""


def dequantized(tensors: Tensors, slots: Collection[str], path: object) -> tuple[Tensors, tuple[str, ...]]:
    """Multiply eight-bit weights by their scales, to float32.

    Weights stay as they are if the model itself has such scales.

    Args:
        tensors: Tensors of the file, by name.
        slots: Names of the model's tensors.
        path: The file, for messages.

    Returns:
        The tensors without the scales that were used and without those of activations, and notes about what was done.

    Raises:
        CheckpointError: The scheme is not supported, or an eight-bit weight has no scale, or one that does not fit.
            Nothing was changed.
    """
    ends = {name.rpartition(".")[2] for name in slots}
    _refuse_schemes(tensors, ends, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in MARKERS}
    stored = [name for name, tensor in tensors.items() if tensor.dtype in (*FLOATS, *WHOLE) and tensor.ndim]
    plan = [scaled for name in stored if (scaled := _find_scale(name, tensors, ends, path)) is not None]
    if not plan:
        return tensors, ()
    by_data = {scaled.data: scaled for scaled in plan}
    lacking = [name for name in stored if tensors[name].dtype in FLOATS and name not in by_data and not _is_scale(name)]
    if lacking:
        raise CheckpointError(
            f"'{path}' has no scale for '{lacking[0]}' ({_dtype(tensors[lacking[0]])}), but scales for others, as "
            f"'{plan[0].scale}'. Expected one for each weight of eight bits. Nothing was changed."
        )
    used = {name for scaled in plan for name in (scaled.scale, scaled.zero_point)}
    parents = {_parent(scaled.data) for scaled in plan}
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name in by_data:
            result[by_data[name].name] = _dequantize(by_data[name], tensors, path)
        elif name not in used and not (_parent(name) in parents and _is_ignored(name)):
            result[name] = tensor
    kinds = ", ".join(sorted({_dtype(tensors[scaled.data]) for scaled in plan}))
    return result, (f"{len(plan)} weights in {kinds} multiplied with their scales, as '{plan[0].scale}'",)


def _find_scale(name: str, tensors: Tensors, ends: Collection[str], path: object) -> Scaled | None:
    """Find the scale of a stored weight; None for a tensor without a scale.

    Args:
        name: Name of an eight-bit tensor in the file.
        tensors: Tensors of the file, by name.
        ends: Last parts of the names in the model.
        path: The file, for messages.
    """
    parent, last = _parent(name), name.rpartition(".")[2]
    if _is_scale(name) or last in (FORMAT, *ROLES[1:]) or _is_ignored(name):
        return None
    if last == "_data":
        base = name.removesuffix("._data")
        scale, zero = f"{base}._scale", f"{base}._shift"
        if scale in tensors and zero not in tensors:
            return None if "_data" in ends else Scaled(base, name, scale)
    if f"{parent}SCB" in tensors and last == "weight" and tensors[name].dtype is torch.int8:
        if int(tensors.get(f"{parent}{FORMAT}", torch.tensor(0)).sum()):
            raise _refusal_error(path, "bitsandbytes, 8 bits in tiles", f"{parent}{FORMAT}")
        return None if "SCB" in ends else Scaled(name, name, f"{parent}SCB")
    if tensors[name].dtype in WHOLE and "weight" not in last:
        return None  # a mask or an index
    spellings = {"name": name, "parent": parent, "last": last}
    scales = [candidate for text in SCALES if (candidate := text.format(**spellings)) in tensors]
    zeros = [candidate for text in ZERO_POINTS if (candidate := text.format(**spellings)) in tensors]
    if scales and scales[0].rpartition(".")[2] in ends:
        return None  # the model keeps the scale, and so the weight in eight bits
    unknown = [neighbor for neighbor in _suspect_neighbors(name, tensors, ends) if neighbor not in (*scales, *zeros)]
    if unknown or len(scales) > 1 or len(zeros) > 1 or (zeros and not scales):
        odd = (unknown or scales[1:] or zeros)[0]
        if odd.rpartition(".")[2] in ends:
            return None
        raise _refusal_error(path, f"a scheme that is not known: '{name}' is {_dtype(tensors[name])}", odd)
    return Scaled(name, name, scales[0], zeros[0] if zeros else "") if scales else None


def _suspect_neighbors(name: str, tensors: Tensors, ends: Collection[str]) -> Iterator[str]:
    """List tensors of the same layer that look like parts of a quantized weight, by a suspect or an unusual name."""
    parent = _parent(name)
    for neighbor, tensor in tensors.items():
        last = neighbor[len(parent) :]
        is_near = neighbor.startswith((f"{name}.", f"{name}_")) or (_parent(neighbor) == parent and neighbor != name)
        if not is_near or last in (*ROLES, FORMAT) or _is_ignored(neighbor) or tensor.dtype in (*FLOATS, *WHOLE):
            continue
        is_odd = last not in ends and tensor.is_floating_point() and not PLAIN.search(last)
        if SUSPECT.search(last) or is_odd:
            yield neighbor


def _dequantize(scaled: Scaled, tensors: Tensors, path: object) -> torch.Tensor:
    """Return (data - zero point) * scale in float32."""
    if not tensors[scaled.scale].is_floating_point():
        raise _refusal_error(path, f"a scale in {_dtype(tensors[scaled.scale])}, as of MX formats", scaled.scale)
    data, scale = tensors[scaled.data].float(), tensors[scaled.scale].float()
    if scaled.scale.endswith("SCB"):
        scale = scale / 127
    spread = _broadcast_scale(scale, data.shape, scaled.scale)
    if spread is None:
        raise CheckpointError(
            f"'{path}' has the scale '{scaled.scale}' {tuple(scale.shape)} for '{scaled.data}' {tuple(data.shape)}, "
            "which fits neither the whole, nor its rows, nor blocks of it without doubt. Dequantize the file with the "
            "library that wrote it. Nothing was changed."
        )
    if scaled.zero_point:
        zero = _broadcast_scale(tensors[scaled.zero_point].float(), data.shape, scaled.zero_point)
        if zero is None:
            raise _refusal_error(path, "a scheme that is not known", scaled.zero_point)
        data = data - zero
    return data * spread


def _broadcast_scale(scale: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor | None:
    """Broadcast a scale to a tensor (out, in, …); None where its shape is ambiguous or does not fit.

    One number scales the whole tensor, (out,) and (out, 1, …) scale rows, and (rows, columns) scale blocks: of
    128 × 128 in `…_scale_inv`, of equal size otherwise.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        return scale.reshape(-1, *[1] * (len(shape) - 1)) if len(scale) == shape[0] else None
    if scale.ndim != len(shape):
        return None
    if all(side in (1, full) for side, full in zip(scale.shape, shape, strict=True)):
        return scale
    equal = [full // side if full % side == 0 else 0 for side, full in zip(scale.shape, shape, strict=True)]
    is_of_128 = all(side == -(-full // BLOCK) for side, full in zip(scale.shape, shape, strict=True))
    sizes = [BLOCK] * len(shape) if is_of_128 and name.endswith(BLOCKS_OF_128) else equal
    if 0 in sizes or (is_of_128 and not name.endswith(BLOCKS_OF_128) and equal != [BLOCK] * len(shape)):
        return None
    for dimension, size in enumerate(sizes):
        scale = scale.repeat_interleave(size, dimension).narrow(dimension, 0, shape[dimension])
    return scale


def _refuse_schemes(tensors: Tensors, ends: Collection[str], path: object) -> None:
    """Refuse files of the schemes in `SCHEMES`, unless the model has tensors of these names itself."""
    foreign = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in ends}
    for pattern, scheme in SCHEMES:
        for name, tensor in foreign.items():
            match = re.search(pattern, f".{name}")
            if match is None or (pattern == r"_blocks$" and not _is_mxfp4(name, tensors)):
                continue
            if tensor.dtype.is_floating_point and scheme == "" and tensor.ndim:
                continue  # a plain weight with such a name
            of_qweight = "GPTQ" if f"{_parent(name)}g_idx" in tensors else "AWQ"
            raise _refusal_error(path, match.expand(scheme) or of_qweight, name)


def _is_mxfp4(name: str, tensors: Tensors) -> bool:
    return name.removesuffix("_blocks") + "_scales" in tensors and tensors[name].dtype is torch.uint8


def _refusal_error(path: object, scheme: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' holds quantized weights ({scheme}), as '{name}' shows, and loading them as they are would be wrong. "
        "Dequantize them with the library that wrote the file, and save the result. Nothing was changed."
    )


def _is_scale(name: str) -> bool:
    last = name.rpartition(".")[2]
    return bool(re.search(r"(^|_)(scales?|scale_inv|zero_points?|shift)$|^scale_|^SCB$", last))


def _is_ignored(name: str) -> bool:
    return bool(ACTIVATIONS.search(name.rpartition(".")[2])) or name.rpartition(".")[2] == FORMAT


def _parent(name: str) -> str:
    return name[: len(name) - len(name.rpartition(".")[2])]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
