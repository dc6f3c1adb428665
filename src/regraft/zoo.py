"""Build networks by name, with their preprocessing.

A name is bare for torchvision (`resnet18`), `timm/NAME` for timm, and `py:path/file.py:Class` or
`py:package.module:Class` for a user's own class, which is imported only if that is allowed.
"""

import contextlib
import fnmatch
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, cast

from torch import nn

from regraft.arguments import check_arguments
from regraft.card import Preprocessing, Recipe, Source, attach, card_of
from regraft.downloads import Download, answering, from_hub, from_url, no_network
from regraft.errors import InputError, ModelError, TrustError, nearest
from regraft.preprocessing import is_processor, of_processor, of_timm, of_transformers
from regraft.wording import option

TIMM = "timm/"
TIMM_NAME = re.compile(r"\w+(\.[\w-]+)?")  # NAME.TAG; timm takes other forms as places to load from
PYTHON = "py:"
FILE_MODULE = "regraft_user_"  # prefix of the modules that are made of files
NETWORK_LIBRARIES = ("http", "huggingface_hub", "httpx", "httpx2", "httpcore2")


def list_models(pattern: str = "*") -> list[str]:
    """List the names that `create_model` knows, torchvision's first, then timm's.

    Args:
        pattern: A glob such as `"resnet*"` or `"timm/vit_*"`.

    >>> list_models("resnet1*")
    ['resnet101', 'resnet152', 'resnet18']
    """
    check_arguments(list_models, locals())
    return [name for name in _torchvision_names() + _timm_names() if fnmatch.fnmatch(name, pattern)]


def build(
    name: str,
    *,
    weights: str = "none",
    trust_code: bool = False,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Build the network `name` as its library defines it, and attach a card with its source and preprocessing.

    Args:
        name: See this module's docstring.
        weights: `"none"`, `"default"` (the library's recommended pretrained weights, downloaded if needed; a user's
            own class keeps its initial weights), or a registered name such as `"IMAGENET1K_V2"`.
        trust_code: Whether a user's own class may be imported.
        arguments: Further arguments of the constructor of torchvision's or timm's; the caller has checked them.

    Raises:
        ModelError: The name is unknown, the class cannot be built without arguments, or weights cannot be downloaded.
        TrustError: The name is `py:…` and `trust_code` is false.
    """
    if name.startswith(PYTHON):
        model, preprocessing, registered = _build_python(name, weights, trust_code)
        name = name.replace(os.sep, "/")  # a file that is saved on Windows names its class for other systems too
    elif name.startswith(TIMM):
        model, preprocessing, registered = _build_timm(name, weights, arguments)
    else:
        model, preprocessing, registered = _build_torchvision(name, weights, arguments)
    source = Source(name=name, weights=registered, arguments=dict(arguments))
    return attach(model, recipe=Recipe(source=source), preprocessing=preprocessing)


def is_network_name(name: str) -> bool:
    """Return whether a name is that of a network or a class, rather than a path: a known one, or one with a prefix."""
    return name.startswith((TIMM, PYTHON)) or (name.isidentifier() and name in _torchvision_names())


def weights_name(name: str, weights: object) -> str | Path:
    """Normalize an argument `weights`: None, a file, a name, or a member of torchvision's enums or its name.

    Returns:
        A file as a `Path`; otherwise the name of weights, `"default"` or `"none"`.

    Raises:
        ModelError: The weights belong to another network, or the value is of another type.
    """
    if weights is None:
        return "none"
    if isinstance(weights, Path):
        return weights
    if isinstance(weights, Enum):
        kind, weights = type(weights).__name__, weights.name
    elif isinstance(weights, str):
        kind, _, member = weights.rpartition(".")
        if not kind.endswith("_Weights") or Path(weights).exists():
            return "default" if weights == "DEFAULT" else weights
        weights = member
    else:
        raise ModelError(
            f"weights is a {type(weights).__name__}, expected a name, a file, or None. Pass weights='default' for "
            "pretrained weights; give tensors that you have to regraft.load_weights(model, …)."
        )
    from torchvision import models

    known = models.get_model_weights(name).__name__ if name in _torchvision_names() else None
    if kind != known:
        what = f"takes {known}" if known else "is no network of torchvision"
        raise ModelError(f"{kind}.{weights} are weights of another network: '{name}' {what}.")
    return "default" if weights == "DEFAULT" else weights


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of images for `model`: that of its card, or one derived from its attributes.

    A user's own class may have an attribute `preprocessing` (a `Preprocessing`, a dict of its fields, or an image
    processor of transformers). timm's `pretrained_cfg` and networks of transformers are supported, also as a part of
    the model. The default is ImageNet's preprocessing, or one for gray images if the first convolution has one channel.
    """
    return _preprocessing_and_source(model)[0]


def own_preprocessing(model: nn.Module) -> Preprocessing | None:
    """Return the preprocessing that a network's own configuration gives; None where only a default is known.

    A saved network keeps it: built anew from its name, timm's has the configuration of other weights, and the image
    processor of transformers is no longer found.
    """
    known, source = _preprocessing_and_source(model)
    is_own = isinstance(getattr(model, "pretrained_cfg", None), dict) or hasattr(model, "preprocessing")
    return known if source is not None or is_own else None


def preprocessing_source(model: nn.Module) -> str | None:
    """Return where the preprocessing of a network of transformers was read, as text; None for any other network."""
    return _preprocessing_and_source(model)[1]


def _preprocessing_and_source(model: nn.Module) -> tuple[Preprocessing, str | None]:
    known = card_of(model).preprocessing
    if known is not None:
        return known, None
    own = getattr(model, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own, None
    if isinstance(own, dict) or is_processor(own):
        try:
            return (Preprocessing.model_validate(own) if isinstance(own, dict) else of_processor(own)), None
        except ValueError as error:
            raise ModelError(
                f"the attribute `preprocessing` of {type(model).__name__} is not usable: {error}"
            ) from error
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    is_gray = first is not None and first.in_channels == 1
    for layer in model.modules():
        timm_config = getattr(layer, "pretrained_cfg", None)
        if isinstance(timm_config, dict) and timm_config.get("input_size") and timm_config.get("mean"):
            return _as_gray(of_timm(timm_config), is_gray), None
        if (reading := of_transformers(layer)) is not None:
            return _as_gray(reading[0], is_gray), reading[1]
    return (Preprocessing(mean=(0.5,), std=(0.5,)) if is_gray else Preprocessing()), None


def _as_gray(preprocessing: Preprocessing, is_gray: bool) -> Preprocessing:
    """Convert preprocessing to one channel if a network takes gray images."""
    if not is_gray or preprocessing.channels == 1:
        return preprocessing
    averages = {name: (sum(getattr(preprocessing, name)) / 3,) for name in ("mean", "std")}
    return preprocessing.model_copy(update=averages)


def import_object(reference: str, *, trust_code: bool) -> Any:
    """Import the object that `py:path/file.py:name` or `py:package.module:name` refers to.

    Raises:
        TrustError: `trust_code` is false; nothing was imported.
        ModelError: The reference is malformed, or the file, module or name does not exist.
    """
    where, separator, attribute = reference.removeprefix(PYTHON).rpartition(":")
    if not separator or not where or not attribute:
        raise ModelError(f"'{reference}' is not of the form py:path/file.py:Name or py:package.module:Name.")
    if not trust_code:
        raise TrustError(
            f"'{reference}' names Python code, which would run with your rights. "
            f"If you know and trust it, pass {option('trust_code', True)}."
        )
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    if not hasattr(module, attribute):
        hint = nearest(attribute, [known for known in vars(module) if not known.startswith("_")])
        raise ModelError(f"no '{attribute}' in {where}. {hint}".rstrip())
    return getattr(module, attribute)


def _build_python(name: str, weights: str, trust_code: bool) -> tuple[nn.Module, Preprocessing, str]:
    if weights not in ("none", "default"):
        raise ModelError(f"'{name}' has no registered weights '{weights}'. Give a file, or 'none'.")
    maker = import_object(name, trust_code=trust_code)
    try:
        model = maker()
    except InputError:
        raise
    except Exception as error:
        raise ModelError(
            f"'{name}' cannot be built: calling it without arguments raised {type(error).__name__}: {error}. "
            "Give each argument of its constructor a default, or name a function that takes none."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"'{name}' gave a {type(model).__name__}, expected a torch.nn.Module.")
    return model, preprocessing_of(model), "none"


def _build_torchvision(name: str, weights: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing, str]:
    from torchvision import models

    if name not in _torchvision_names():
        raise ModelError(_unknown_model(name))
    known = models.get_model_weights(name)
    if weights == "none":
        chosen = None
    elif weights == "default":
        chosen = cast(Any, known).DEFAULT
    elif weights in known.__members__:
        chosen = known[weights]
    else:
        raise ModelError(
            f"no weights '{weights}' for {name}: it is neither a file nor one of "
            f"{', '.join(entry.name for entry in known)}."
        )
    with _network_errors(name, download := _download_of(name, weights)), answering(name, download):
        model = models.get_model(name, weights=chosen, **_extra_arguments(name), **arguments)
    preset = (chosen or cast(Any, known).DEFAULT).transforms()
    preprocessing = Preprocessing(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    return model, preprocessing, chosen.name if chosen else "none"


def _extra_arguments(name: str) -> dict[str, Any]:
    # Both constructors warn unless the argument is given; True is their default.
    return {"init_weights": True} if name in ("inception_v3", "googlenet") else {}


def _build_timm(name: str, weights: str, arguments: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing, str]:
    import timm

    bare, pretrained = _timm_name(name, weights), weights != "none"
    if bare.split(".")[0] not in timm.list_models() or not TIMM_NAME.fullmatch(bare):
        raise ModelError(_unknown_model(name))
    try:
        with _network_errors(name, download := _download_of(name, weights)), answering(name, download):
            model = timm.create_model(bare, pretrained=pretrained, **arguments)
    except RuntimeError as error:
        raise ModelError(f"timm cannot build '{bare}': {error}") from error
    config = cast("dict[str, Any]", model.pretrained_cfg)
    return model, of_timm(config), (config.get("tag") or "default") if pretrained else "none"


def _timm_name(name: str, weights: str) -> str:
    """Return NAME or NAME.TAG, as timm takes it."""
    bare = name.removeprefix(TIMM)
    return bare if weights in ("none", "default") else f"{bare.split('.')[0]}.{weights}"


def needs_download(name: str, weights: str) -> bool:
    """Return whether `build` would download weights; names that it refuses need none."""
    download = _download_of(name, weights)
    return download is not None and not download.is_present


def _download_of(name: str, weights: str) -> Download | None:
    if weights == "none" or name.startswith(PYTHON):
        return None
    if name.startswith(TIMM):
        import timm

        config: Any = None
        with contextlib.suppress(RuntimeError):  # no such tag
            config = timm.get_pretrained_cfg(_timm_name(name, weights))
        if config is None or not (config.hf_hub_id or config.url):
            return None
        return from_hub(config.hf_hub_id, config.hf_hub_filename) if config.hf_hub_id else from_url(config.url)
    from torchvision import models

    known: Any = models.get_model_weights(name) if name in _torchvision_names() else None
    chosen = known.__members__.get("DEFAULT" if weights == "default" else weights) if known is not None else None
    return from_url(chosen.url) if chosen is not None else None


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm_names() -> list[str]:
    import timm

    return [TIMM + name for name in timm.list_models()]


def _unknown_model(name: str) -> str:
    known = _torchvision_names() + _timm_names()
    in_timm = [candidate for candidate in known if candidate == TIMM + name]
    hint = f"Did you mean '{in_timm[0]}'? " if in_timm else f"{nearest(name, known)} ".lstrip()
    problem = f"no model '{name}'" if name else "the name is empty"
    return f"{problem}. {hint}`regraft models` lists all; a class of your own is py:FILE:Class."


@contextlib.contextmanager
def _network_errors(name: str, download: Download | None) -> Iterator[None]:
    """Convert the network errors of all libraries to one error with advice."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        is_cut_off = isinstance(error, RuntimeError) and str(error).startswith("invalid hash value")  # torch.hub's
        if not isinstance(error, OSError) and not is_cut_off and library not in NETWORK_LIBRARIES:
            raise
        raise ModelError(no_network(name, error, download)) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"no file '{path}' (looked from {Path.cwd()}). Give the path of the file with the class.")
    if (known := _imported_from(path)) is not None:
        return known
    version = f"{path.resolve()} {path.stat().st_mtime_ns}"
    module_name = f"{FILE_MODULE}{path.stem}_{hashlib.sha256(version.encode()).hexdigest()[:8]}"
    if module_name in sys.modules:  # importing it again would create a second class of the same name
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look up the module of a class
    try:
        with _importable_beside(path):
            return _run_import(lambda: (cast(Any, spec.loader).exec_module(module), module)[1], str(path))
    except ModelError:
        del sys.modules[module_name]
        raise


def _imported_from(path: Path) -> ModuleType | None:
    """Return the module that Python itself imported from a file, or runs as the script: it must not run twice."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).name == path.name and not name.startswith(FILE_MODULE):
            with contextlib.suppress(OSError):
                if path.samefile(file):
                    return module
    return None


@contextlib.contextmanager
def _importable_beside(path: Path) -> Iterator[None]:
    """Let a file import what lies beside it, as a script can, inside of the block."""
    folder = str(path.resolve().parent)
    is_new = folder not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        yield
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)


def _import_module(name: str) -> ModuleType:
    return _run_import(lambda: importlib.import_module(name), name)


def _run_import(load: Callable[[], ModuleType], where: str) -> ModuleType:
    try:
        return load()
    except Exception as error:
        raise ModelError(f"'{where}' cannot be imported: {type(error).__name__}: {error}.") from error
