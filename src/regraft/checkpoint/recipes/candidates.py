"""Sources from which a network may come, as far as it shows them; each is to be proved by building it.

A network of timm keeps the name of its architecture, one of transformers its configuration. One of torchvision keeps
neither, so all builders of its file are candidates, those with the nearest number of parameters first. Arguments of the
constructor are read off the network and off one that was built without them; those that differ are tried.
"""

from typing import Any

from torch import nn

from regraft.card import Source
from regraft.checkpoint.recipes.library_source import library_arguments
from regraft.checkpoint.recipes.transformers_config import PREFIX, config_data
from regraft.surgery.layer_text.read_back import reference_of
from regraft.torch_internals import ConvBase, module_of_transformers
from regraft.zoo import PYTHON, TIMM, TIMM_NAME


def library_sources(model: nn.Module) -> list[Source]:
    """Return the networks of libraries that `model` may have been, the likeliest first.

    Raises:
        ModelError: The configuration of a network of transformers cannot be written as data.
    """
    module, class_name = type(model).__module__, type(model).__name__
    if module.startswith("torchvision.models."):
        return [Source(name=name) for name in _torchvision_names(model)]
    if module.startswith("timm.models."):
        config = getattr(model, "pretrained_cfg", None)
        name = config.get("architecture") if isinstance(config, dict) else None
        return [Source(name=TIMM + name)] if isinstance(name, str) and TIMM_NAME.fullmatch(name) else []
    if module.startswith("transformers.models.") and module_of_transformers(class_name) is not None:
        return [Source(name=PREFIX + class_name, arguments={"config": config_data(model.config)})]
    return []


def own_source(model: nn.Module) -> Source:
    """Return the class of the user's own that `model` is of, to be called without arguments.

    Raises:
        EditError: The class cannot be imported from anywhere; the message says why.
    """
    return Source(name=f"{PYTHON}{reference_of(model)}")


def read_arguments(model: nn.Module, reference: nn.Module, source: Source) -> dict[str, Any]:
    """Return the arguments of a library's constructor whose values, read off `model` and `reference`, differ."""
    known = library_arguments(source.name)
    traces, usual = _traces(model), _traces(reference)
    return {name: value for name, value in traces.items() if name in known and value != usual.get(name, value)}


def _traces(model: nn.Module) -> dict[str, Any]:
    """Read values of constructor arguments off a network: those in attributes of their names, and those of layers."""
    values = {name: value for name, value in vars(model).items() if _is_plain(value)}
    layers = list(model.modules())
    outputs = [layer for layer in layers if isinstance(layer, (nn.Linear, ConvBase))]
    if outputs and "num_classes" not in values:
        last = outputs[-1]
        values["num_classes"] = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    convolution = next((layer for layer in layers if isinstance(layer, ConvBase)), None)
    if convolution is not None:
        values["in_chans"] = convolution.in_channels
    size = next((size for layer in layers if _is_plain(size := getattr(layer, "img_size", None))), None)
    if size is not None:
        values["img_size"] = size
    pool_type = getattr(getattr(model, "global_pool", None), "pool_type", None)
    if isinstance(pool_type, str):
        values["global_pool"] = pool_type
    rates = [rate for layer in layers if isinstance(rate := getattr(layer, "drop_prob", None), (int, float))]
    values["drop_path_rate"] = round(max(rates, default=0.0), 6)  # timm draws them up in float32
    return values


def _is_plain(value: object) -> bool:
    numbers = value if isinstance(value, tuple) else (value,)
    return isinstance(value, str) or (bool(numbers) and all(isinstance(n, (bool, int, float)) for n in numbers))


def _torchvision_names(model: nn.Module) -> list[str]:
    from torchvision import models

    names = models.list_models(module=models)
    names = [name for name in names if models.get_model_builder(name).__module__ == type(model).__module__]
    size = sum(parameter.numel() for parameter in model.parameters())

    def distance(name: str) -> int:
        weights: Any = models.get_model_weights(name)
        return abs(weights.DEFAULT.meta["num_params"] - size)

    return sorted(names, key=distance)
