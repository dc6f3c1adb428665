"""Rename tensors as libraries do while they load their own files: older versions, and formats of the original authors.

Each library has its own mechanism, which runs here on the names and tensors of the file only:

- torch: `_load_from_state_dict` of a layer, and the pre-hooks registered on it, run on a copy of the layer whose
  parameters have no memory. torchvision's ViT renames `mlp.linear_1` this way, and weight norm its older names.
- timm: `checkpoint_filter_fn` of the module that defines the network, which knows the files of its authors.
- transformers: the conversions that `from_pretrained` applies.

What a library itself renames is certain. If none of the mechanisms loads more of the model, the names stay.
"""

import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.anatomy.paths import is_within
from regraft.checkpoint.foreign.state_dicts import Tensors
from regraft.checkpoint.matching.adapting import POSITIONS
from regraft.checkpoint.matching.naming import WRAPPER_PARTS, fit_names, strip_wrapper_parts
from regraft.checkpoint.matching.reparametrized import without_reparametrization
from regraft.torch_internals import has_loading_code, run_loading_code, with_replaced_tensors

FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "_convert_state_dict")
OPTIONS = ("adapt_layer_scale",)  # arguments of a filter that some families of a module set
TABLES: tuple[tuple[str, str], ...] = (  # what libraries rename outside of their layers: torchvision's densenet, and
    # the norm layers of TensorFlow, which Hugging Face's and others' files of converted networks have
    (r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$", r"\1\2"),
    (r"^(.*(?i:norm|bn|ln)\w*)\.gamma$", r"\1.weight"),
    (r"^(.*(?i:norm|bn|ln)\w*)\.beta$", r"\1.bias"),
    (r"^(.*)\.moving_mean$", r"\1.running_mean"),
    (r"^(.*)\.moving_var(?:iance)?$", r"\1.running_var"),
)

Conversion = Callable[[nn.Module, Tensors, Mapping[str, torch.Tensor]], Tensors | None]


def renamed_by_libraries(model: nn.Module, tensors: Tensors, slots: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Rename tensors as the model's library does while loading.

    Args:
        model: The model; it is not changed.
        tensors: Tensors of the file, by name.
        slots: Tensors of the model, by name.

    Returns:
        Tensors under their new names, and new name → which mechanism renamed it.
    """
    slots = {now: slots[name] for name, now in strip_wrapper_parts(slots).items()}
    stripped = {now: tensors[name] for name, now in strip_wrapper_parts(tensors).items()}
    best, renamed_by = tensors, {}
    most = _count_filled(_fitted_names(tensors, slots), slots)
    if most == len(slots):
        return best, renamed_by
    for library, start in _starting_points(model, tensors, stripped, slots):
        named = _fitted_names(start, slots)
        origin = {id(tensor): library for tensor in start.values()} if start is not tensors else {}
        for source, convert in STEPS:
            after = _run_quietly(convert, model, named, slots)
            if after is not None and _count_filled(after, slots) > _count_filled(named, slots):
                before = {id(tensor): name for name, tensor in named.items()}
                origin |= {id(t): source for name, t in after.items() if before.get(id(t)) != name}
                named = after
        if _count_filled(named, slots) > most:
            most, best = _count_filled(named, slots), named
            names_by_id = {id(tensor): name for name, tensor in tensors.items()}
            renamed_by = {
                name: origin[id(t)] for name, t in named.items() if id(t) in origin and names_by_id.get(id(t)) != name
            }
    return best, renamed_by


def _starting_points(
    model: nn.Module, tensors: Tensors, stripped: Tensors, slots: Tensors
) -> Iterator[tuple[str, Tensors]]:
    """List the starting points as (mechanism, tensors): the file as it is, and after each filter of its library."""
    yield "", tensors
    core = _library_network(model)
    for convert in _timm_filters(core):
        after = _run_quietly(convert, core, stripped, slots)
        if after is not None and after.keys() != stripped.keys():
            # Positions of another image size are for the caller to allow.
            resized = {
                n for n in stripped if n in after and POSITIONS.search(n) and stripped[n].shape != after[n].shape
            }
            yield "timm does", {**after, **{name: stripped[name] for name in resized}}
    if type(core).__module__.startswith("transformers."):
        after = _run_quietly(_by_transformers, core, stripped, core.state_dict())
        if after is not None and after.keys() != stripped.keys():
            yield "transformers does", after


def _library_network(model: nn.Module) -> nn.Module:
    """Return the only network of a library inside of the user's model; otherwise the model itself."""
    libraries = ("timm.models.", "transformers.models.")
    top: list[str] = []
    for path, layer in model.named_modules():
        if type(layer).__module__.startswith(libraries) and not any(is_within(path, other) for other in top):
            top.append(path)
    return model.get_submodule(top[0]) if len(top) == 1 else model


def _fitted_names(tensors: Tensors, slots: Tensors) -> Tensors:
    """Return tensors under the model's names, without wrapper parts and prefixes; unchanged where names would clash."""
    file_shapes, model_shapes = ({name: tuple(t.shape) for name, t in each.items()} for each in (tensors, slots))
    names = fit_names(file_shapes, model_shapes).names
    has_clash = len(set(names.values())) < len(names)
    return tensors if has_clash else {names[name]: tensor for name, tensor in tensors.items()}


def _count_filled(tensors: Tensors, slots: Tensors) -> int:
    """Count the tensors that have a slot of equal name and shape."""
    return sum(name in slots and (slots[name].shape == tensor.shape) for name, tensor in tensors.items())


def _run_quietly(
    convert: Conversion, model: nn.Module, tensors: Tensors, slots: Mapping[str, torch.Tensor]
) -> Tensors | None:
    """Run a conversion without warnings or changes to the random state; None where it fails, as on a foreign file."""
    with preserved_randomness(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            after = convert(model, dict(tensors), slots)
        except Exception:  # code of libraries may raise anything on names that it does not know
            return None
    is_sound = isinstance(after, Mapping) and all(isinstance(value, torch.Tensor) for value in after.values())
    return dict(after) if is_sound and after is not None else None


def _by_layers(model: nn.Module, tensors: Tensors, slots: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename as the layers of a model do while a state dict is loaded."""
    for path, layer in model.named_modules():
        if not has_loading_code(layer):
            continue
        # The layer's own code must run, but must not write to the model: a shallow copy on the meta device takes it.
        shadow = with_replaced_tensors(layer, _on_meta)
        prefix = "".join(f"{part}." for part in path.split(".") if part and part not in WRAPPER_PARTS)
        run_loading_code(shadow, tensors, prefix)
    return tensors


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor or parameter of the same shape on the meta device."""
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _timm_filters(model: nn.Module) -> Iterator[Conversion]:
    """List the filters of the timm module that defines a model, with and without their options."""
    module = sys.modules.get(type(model).__module__)
    if module is None or not module.__name__.startswith("timm.models."):
        return
    for name in FILTERS:
        function: Any = getattr(module, name, None)
        if function is None:
            continue
        known = inspect.signature(function).parameters
        for options in ({}, *({option: True} for option in OPTIONS if option in known)):
            if "model" in known:
                yield lambda model, tensors, slots, run=function, options=options: run(tensors, model, **options)
            else:
                yield lambda model, tensors, slots, run=function, options=options: run(tensors, **options)


def _by_transformers(model: Any, tensors: Tensors, slots: Mapping[str, torch.Tensor]) -> Tensors:
    """Apply the conversions of `from_pretrained`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: conversion for conversion in converters for pattern in conversion.source_patterns}
    result: Tensors = {}
    waiting: dict[str, Any] = {}  # first new name → converter that collects its tensors, as for a fused qkv weight
    for name, tensor in tensors.items():
        new_name, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(slots))
        if pattern is None:
            result[new_name] = tensor
        else:
            waiting.setdefault(new_name, copy.deepcopy(by_pattern[pattern])).add_tensor(new_name, name, pattern, tensor)
    for first, converter in waiting.items():
        for new_name, value in converter.convert(first, model=model, config=model.config).items():
            result[new_name] = value[0] if isinstance(value, list) else value
    return result


def _by_tables(model: nn.Module, tensors: Tensors, slots: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename by `TABLES`, where the model has the new name and the file does not."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        spellings = (re.sub(pattern, new, name) for pattern, new in TABLES)
        now = next((now for now in spellings if now != name and now in slots and now not in tensors), name)
        result[now] = tensor
    return result


STEPS: tuple[tuple[str, Conversion], ...] = (
    ("the model's own layers do", _by_layers),
    ("its library does", _by_tables),
    ("weight norm, spectral norm or pruning does", without_reparametrization),
)
