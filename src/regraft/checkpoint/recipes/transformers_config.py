"""Networks of transformers as the name of their class and the data of their configuration.

Only what the installed library defines is built: a class that it exports from a file `modeling_*` of its own, with that
class's own kind of configuration. Entries that lead to anything else are left out: names of other code and of other
repositories, ways to compute that are fetched from a hub, and types of weights, which the tensors of a checkpoint have
themselves. Families whose construction may fetch kernels or backbones are refused.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from regraft.errors import ModelError, RegraftError
from regraft.torch_internals import attention_of, module_of_transformers

PREFIX = "transformers/"
ATTENTION = "attn_implementation"
ATTENTIONS = ("eager", "sdpa")  # of torch; any other may be fetched from a hub
LEFT_OUT = frozenset(
    (
        *("architectures", "auto_map", "custom_pipelines", "dtype", "torch_dtype", "transformers_version"),
        *("name_or_path", "trust_remote_code", "code_revision", "revision", "num_labels", "kernel_config"),
        *("experts_implementation", "use_kernels", "distributed_config", "use_pretrained_backbone"),
        *("quantization_config", "compression_config", "sparsity_config", "adapter_path", "peft_config"),
    )
)
FETCHES = re.compile(r"\b(get_kernel|lazy_load_kernel|load_backbone|timm\.create_model|torch\.hub\.\w+)\(")
MAX_INTEGER = 2**24  # some constructors run a loop over a number of the configuration


def is_config(value: object) -> bool:
    """Return whether a value is a configuration that transformers defines."""
    if not type(value).__module__.startswith("transformers."):
        return False
    return isinstance(value, sys.modules["transformers"].PretrainedConfig)


def config_data(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON data, without the entries that are left out.

    Raises:
        ModelError: It holds values that JSON does not have, or numbers above the limit.
    """
    attention = attention_of(config)
    try:
        data = json.loads(json.dumps(_cleaned(config.to_dict()), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(f"its configuration ({type(config).__name__}) cannot be written as JSON: {error}") from error
    return {**data, ATTENTION: attention} if attention is not None else data


def build_from_config(class_name: str, data: Mapping[str, Any]) -> nn.Module:
    """Build a network of transformers with fresh weights.

    Raises:
        ModelError: transformers is not installed, has no such class, or cannot build it from this configuration.
    """
    shown = f"{PREFIX}{class_name[:80]}"
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(f"'{shown}' needs the library transformers. Install it: pip install 'regraft[hf]'.")
    import transformers

    module = module_of_transformers(class_name)
    if module is None or not module.startswith("models.") or ".modeling_" not in module:
        raise ModelError(f"the installed transformers {transformers.__version__} has no network '{class_name[:80]}'.")
    kind: Any = getattr(transformers, class_name)
    config_class: Any = getattr(kind, "config_class", None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and config_class):
        raise ModelError(f"'{shown}' is no network with a configuration.")
    _require_closed(shown, config_class)
    try:
        config = config_class.from_dict(_cleaned(data, is_outermost=True))
    except ModelError as error:
        raise ModelError(f"'{shown}' cannot be configured: {error}.") from error
    except Exception as error:  # a configuration in a file may hold anything
        raise ModelError(f"'{shown}' cannot be configured: {type(error).__name__}: {str(error)[:200]}") from error
    for part in _configs(config):
        _require_closed(shown, type(part))
    try:
        return kind(config)
    except RegraftError:  # of a limit, by whoever builds
        raise
    except Exception as error:
        raise ModelError(f"'{shown}' cannot be built: {type(error).__name__}: {str(error)[:200]}") from error


def _cleaned(value: Any, *, is_outermost: bool = False) -> Any:
    """Return data of a configuration without the entries that are left out, at any depth.

    Raises:
        ModelError: A number is above the limit, or the attention is not one of torch's.
    """
    if isinstance(value, Mapping):
        kept = {
            str(key): _cleaned(item)
            for key, item in value.items()
            if not str(key).startswith("_") and key not in LEFT_OUT and key != ATTENTION
        }
        attention = value.get(ATTENTION) if is_outermost else None
        if attention is not None and attention not in ATTENTIONS:
            raise ModelError(f"it computes attention by {str(attention)[:80]!r}, expected {' or '.join(ATTENTIONS)}")
        return {**kept, ATTENTION: attention} if attention is not None else kept
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ModelError(f"its configuration holds the number {value}, and {MAX_INTEGER:,} is the most")
    return value


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and those in it."""
    yield config
    for value in vars(config).values():
        if is_config(value):
            yield from _configs(value)


def _require_closed(shown: str, config_class: type) -> None:
    """Refuse a configuration of a family whose code may fetch something when a network is built.

    Raises:
        ModelError: It may; or the configuration is not defined in the library.
    """
    folder = Path()
    if config_class.__module__.startswith("transformers.models."):
        folder = Path(str(sys.modules[config_class.__module__].__file__)).parent
        texts = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("modeling_*.py")))
        if not any(FETCHES.search(text) for text in texts):
            return
    raise ModelError(
        f"'{shown}' is not built: networks of the family '{folder.name or config_class.__module__}' may fetch parts of "
        "themselves. Build it yourself, and use load_weights(model, path)."
    )
