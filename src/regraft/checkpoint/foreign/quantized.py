"""Turn weights that are stored in eight bits with a scale beside them back into numbers, or name the scheme and refuse.

A stored weight of eight bits means its number times a scale that lies beside it in the file. Loaded without that scale
it is wrong by orders of magnitude, with the right name and shape. So every tensor beside a weight of eight bits is
accounted for: it is a scale whose shape says what it scales, something that belongs to activations, or the file is
refused.

Sources: the layouts of compressed-tensors and vLLM (`weight_scale`, `weight_zero_point`), DeepSeek-V3
(`weight_scale_inv`, blocks of 128 × 128, which is multiplied in spite of its name), ComfyUI (`scale_weight`),
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
BLOCK = 128  # sides of the blocks of `weight_scale_inv`
SCALES = ("{name}_scale", "{name}_scale_inv", "{name}.scale", "{name}_scales", "{parent}scale_{last}", "{parent}scale",
          "{parent}scales", "{parent}scale_inv")  # fmt: skip
ZERO_POINTS = ("{name}_zero_point", "{name}.zero_point", "{parent}zero_point", "{parent}zero_points")
ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|act|activation|k|v|q|kv)_?(scale|zero_point|amax)|scale_(input|output)$|_amax_history$"
)
BLOCKS_OF_128 = ("_scale_inv", "scale_inv")
ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta")
PLAIN = re.compile(r"bias|weight$|norm|mean|var$|gamma|beta|embed|token")  # other parameters of a layer
SUSPECT = re.compile(r"scale|zero|absmax|amax|quant|codebook|SCB|(^|[._])(lut|qmap|nf4|fp4)", re.IGNORECASE)
MARKERS = ("scaled_fp8",)  # of ComfyUI: says that scales are there
FORMAT = "weight_format"  # of bitsandbytes: 0 stands for rows in their order

SCHEMES: tuple[tuple[str, str], ...] = (  # ending of a name, and the scheme that has such names; the first that fits
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
    """A weight of a file that means its numbers times a scale.

    Attributes:
        name: Of the weight, as it is without its scale.
        data: The stored numbers.
        scale: By name in the file.
        zero_point: By name in the file; empty where there is none.
    """

    name: str
    data: str
    scale: str
    zero_point: str = ""


def dequantized(tensors: Tensors, slots: Collection[str], path: object) -> tuple[Tensors, tuple[str, ...]]:
    """Multiply weights of eight bits with the scales beside them, as float32.

    Weights of a model that keeps such scales itself are left as they are.

    Args:
        tensors: Of the file, by name.
        slots: Names of the model's tensors.
        path: The file, for messages.

    Returns:
        The tensors without scales that were used and those of activations, and what was done.

    Raises:
        CheckpointError: They are quantized by a scheme that is not read, or a weight of eight bits lacks its scale, or
            has one that does not fit. Nothing was changed.
    """
    ends = {name.rpartition(".")[2] for name in slots}
    _refuse_schemes(tensors, ends, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in MARKERS}
    stored = [name for name, tensor in tensors.items() if tensor.dtype in (*FLOATS, *WHOLE) and tensor.ndim]
    plan = [scaled for name in stored if (scaled := _scaled(name, tensors, ends, path)) is not None]
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
            result[by_data[name].name] = _values(by_data[name], tensors, path)
        elif name not in used and not (_parent(name) in parents and _is_ignored(name)):
            result[name] = tensor
    kinds = ", ".join(sorted({_dtype(tensors[scaled.data]) for scaled in plan}))
    return result, (f"{len(plan)} weights in {kinds} multiplied with their scales, as '{plan[0].scale}'",)


def _scaled(name: str, tensors: Tensors, ends: Collection[str], path: object) -> Scaled | None:
    """Find the scale of a stored weight; None for a tensor that needs none."""
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
            raise _refused(path, "bitsandbytes, 8 bits in tiles", f"{parent}{FORMAT}")
        return None if "SCB" in ends else Scaled(name, name, f"{parent}SCB")
    if tensors[name].dtype in WHOLE and "weight" not in last:
        return None  # a mask or an index
    spellings = {"name": name, "parent": parent, "last": last}
    scales = [made for text in SCALES if (made := text.format(**spellings)) in tensors]
    zeros = [made for text in ZERO_POINTS if (made := text.format(**spellings)) in tensors]
    if scales and scales[0].rpartition(".")[2] in ends:
        return None  # the model keeps the scale, and so the weight in eight bits
    unknown = [other for other in _beside(name, tensors, ends) if other not in (*scales, *zeros)]
    if unknown or len(scales) > 1 or len(zeros) > 1 or (zeros and not scales):
        odd = (unknown or scales[1:] or zeros)[0]
        if odd.rpartition(".")[2] in ends:
            return None
        raise _refused(path, f"a scheme that is not known: '{name}' is {_dtype(tensors[name])}", odd)
    return Scaled(name, name, scales[0], zeros[0] if zeros else "") if scales else None


def _beside(name: str, tensors: Tensors, ends: Collection[str]) -> Iterator[str]:
    """List what of the same layer looks like a part of a quantized weight, by its name or as no layer has it."""
    parent = _parent(name)
    for other, tensor in tensors.items():
        last = other[len(parent) :]
        is_near = other.startswith((f"{name}.", f"{name}_")) or (_parent(other) == parent and other != name)
        if not is_near or last in (*ROLES, FORMAT) or _is_ignored(other) or tensor.dtype in (*FLOATS, *WHOLE):
            continue
        is_odd = last not in ends and tensor.is_floating_point() and not PLAIN.search(last)
        if SUSPECT.search(last) or is_odd:
            yield other


def _values(scaled: Scaled, tensors: Tensors, path: object) -> torch.Tensor:
    if not tensors[scaled.scale].is_floating_point():
        raise _refused(path, f"a scale in {_dtype(tensors[scaled.scale])}, as of MX formats", scaled.scale)
    data, scale = tensors[scaled.data].float(), tensors[scaled.scale].float()
    if scaled.scale.endswith("SCB"):
        scale = scale / 127
    spread = _spread(scale, data.shape, scaled.scale)
    if spread is None:
        raise CheckpointError(
            f"'{path}' has the scale '{scaled.scale}' {tuple(scale.shape)} for '{scaled.data}' {tuple(data.shape)}, "
            "which fits neither the whole, nor its rows, nor blocks of it without doubt. Dequantize the file with the "
            "library that wrote it. Nothing was changed."
        )
    if scaled.zero_point:
        zero = _spread(tensors[scaled.zero_point].float(), data.shape, scaled.zero_point)
        if zero is None:
            raise _refused(path, "a scheme that is not known", scaled.zero_point)
        data = data - zero
    return data * spread


def _spread(scale: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor | None:
    """Return a scale so that it can be multiplied with a tensor (out, in, …); None where it does not fit for sure.

    One number is for all. (out,) and (out, 1, …) are for rows, (rows, columns) for blocks: of 128 × 128 in
    `…_scale_inv`, of equal size otherwise.
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
    for pattern, scheme in SCHEMES:
        for name, tensor in tensors.items():
            match = re.search(pattern, f".{name}")
            if (
                match is None
                or name.rpartition(".")[2] in ends
                or (pattern == r"_blocks$" and not _is_mxfp4(name, tensors))
            ):
                continue
            if tensor.dtype.is_floating_point and scheme == "" and tensor.ndim:
                continue  # a weight that is called so
            if not scheme:
                has_order = f"{_parent(name)}g_idx" in tensors
                raise _refused(path, "GPTQ" if has_order else "AWQ", name)
            raise _refused(path, match.expand(scheme), name)


def _is_mxfp4(name: str, tensors: Tensors) -> bool:
    return name.removesuffix("_blocks") + "_scales" in tensors and tensors[name].dtype is torch.uint8


def _refused(path: object, scheme: str, name: str) -> CheckpointError:
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
