"""Write layers as text, and build layers from text.

A layer expression reads like the call that builds the layer: `Linear(512, 400)`, `Sequential(first=Linear(3, 4),
second=Tanh())`, `ModuleDict({'a': ReLU()})`. It is the one form of layers on the command line, in plans and in the
recipe of a checkpoint. It may call any layer of `torch.nn` by its bare name, `torchvision.ops.X` and `timm.layers.X`;
a class of the user's own is `py('path/file.py:Class', width=4)` or `py('package.module:Class', 4)`, and is imported
only with `trust_code`. Text is parsed and never evaluated.
"""

import contextlib
import importlib
import inspect
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from regraft.anatomy.modes import preserved_randomness
from regraft.errors import EditError, InputError, nearest
from regraft.surgery.layer_text.parse import EXPECTED, LayerCall, calls_in, parsed, shortened, written
from regraft.surgery.layer_text.read_back import LIBRARIES, OWN, library_name, parameters_of, read_call, undescribable
from regraft.zoo import PYTHON, import_object

MAX_ELEMENTS = 20_000_000_000  # of all tensors of one text
MAX_REPEATS = 1000
MAX_LAYERS = 20_000  # by copying
MAX_OPERATIONS = 200_000  # of torch, to build all of one text
REPEATS = (
    "num_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_experts",
    "filt_size",
)  # how often, not how wide
OF_TORCH = ("nn.", "torch.nn.")  # may stand before the name of a layer, and are never written
PLAIN = (bool, int, float, str, type(None), tuple, list, types.FunctionType, types.BuiltinFunctionType, type)


def describe(layer: nn.Module, *, tied: bool = False) -> str:
    """Write the text that builds a layer like `layer`, with fresh weights.

    Defaults are left out, and the same layer always gives the same text. The text is checked by building it on the meta
    device: it gives the same layers, names and shapes of tensors, and settings.

    Args:
        layer: A layer of torch.nn, torchvision.ops or timm.layers, or one of a class that keeps the arguments of its
            constructor in attributes of the same names; also containers of such layers.
        tied: Whether weights that several layers share may be written as separate weights, as the caller ties them
            again after building.

    Raises:
        EditError: No text builds such a layer; the message says why.

    >>> describe(nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU()))
    'Sequential(Linear(8, 4, bias=False), ReLU())'
    """
    text = written(read_call(layer))
    try:
        rebuilt = _dry_run(parsed(text), trust_code=True)  # the code of `layer` has run already
    except InputError as error:
        raise undescribable(layer, "", f"the text '{shortened(text)}' builds no such layer ({error})") from error
    _require_same(layer, rebuilt, shortened(text), tied=tied)
    return text


def construct(text: str, *, trust_code: bool = False) -> nn.Module:
    """Build the layer that a layer expression describes, with fresh weights.

    Args:
        text: One layer expression.
        trust_code: Whether a class of the user's own, `py('FILE:Class')`, may be imported.

    Raises:
        EditError: The text is malformed, names no layer, asks for arguments that the layer does not take, or for more
            weights than any network has. Nothing was executed.
        TrustError: It names a class of the user's own and `trust_code` is false; nothing was imported.

    >>> construct("Sequential(first=Linear(3, 4), second=Tanh())")
    Sequential(
      (first): Linear(in_features=3, out_features=4, bias=True)
      (second): Tanh()
    )
    """
    layers = construct_all(text, trust_code=trust_code)
    if len(layers) > 1:
        raise EditError(
            f"'{shortened(text)}' holds {len(layers)} layers, expected one. Write Sequential(…) around them, or give "
            "them one by one."
        )
    return layers[0]


def construct_all(text: str, *, trust_code: bool = False) -> list[nn.Module]:
    """Build the layers that stand in a text, separated by commas; see `construct`.

    >>> [type(layer).__name__ for layer in construct_all("Linear(512, 400), ReLU()")]
    ['Linear', 'ReLU']
    """
    value = parsed(text)
    calls = value if isinstance(value, tuple) else (value,)
    wrong = next((call for call in calls if not isinstance(call, LayerCall)), None if calls else ())
    if wrong is not None:
        raise EditError(f"'{shortened(text)}' holds {shortened(repr(wrong), 40)}, which is no layer. {EXPECTED}")
    _dry_run(calls, trust_code=trust_code)
    makers = _makers(calls, trust_code=trust_code)
    return [_built(call, makers) for call in calls]


class TooLargeError(EditError):
    """A text asks for more weights than may be built."""


_most_elements: ContextVar[int] = ContextVar("most_elements", default=MAX_ELEMENTS)


def max_elements() -> int:
    """Return the number of elements that all tensors of one text may have together."""
    return _most_elements.get()


@contextlib.contextmanager
def at_most(elements: int) -> Iterator[None]:
    """Limit the number of elements of all tensors of one text together, inside of the block."""
    token = _most_elements.set(min(elements, MAX_ELEMENTS))
    try:
        yield
    finally:
        _most_elements.reset(token)


class CountedConstruction(TorchFunctionMode):
    """Limits the operations of a constructor: some run a loop over an argument, which may be any number."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count += 1
        if self._count > MAX_OPERATIONS:
            raise EditError(f"a text asks for more than {MAX_OPERATIONS:,} operations, to be built alone.")
        return func(*args, **(kwargs or {}))


def _dry_run(value: Any, *, trust_code: bool) -> Any:
    """Build everything on the meta device, and refuse what would need too much memory."""
    makers = _makers(value, trust_code=trust_code)
    with warnings.catch_warnings(), preserved_randomness():
        warnings.simplefilter("ignore")  # the real run gives them
        with CountedConstruction():
            built = _built(value, makers, dry=True)
    layers = built if isinstance(built, tuple) else (built,)
    text = ", ".join(map(str, value if isinstance(value, tuple) else (value,)))
    tensors = (tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    elements = sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))
    if elements > (most := _most_elements.get()):
        raise TooLargeError(
            f"'{shortened(text)}' asks for {elements:,} weights, and no more than "
            f"{most:,} are built from {'a text' if most == MAX_ELEMENTS else 'this file'}. Nothing was allocated."
        )
    return built


def _makers(value: Any, *, trust_code: bool) -> dict[str, type[nn.Module]]:
    """Return the class of each call by its label; those of libraries first, so that user code is imported last."""
    calls = sorted(calls_in(value), key=lambda call: call.name == OWN)
    return {_label(call): _own_class(call, trust_code) if call.name == OWN else _library_class(call) for call in calls}


def _label(call: LayerCall) -> str:
    return f"{OWN}:{call.positional[0]}" if call.name == OWN and call.positional else call.name


def _library_class(call: LayerCall) -> type[nn.Module]:
    prefix = next((prefix for prefix in sorted(OF_TORCH, key=len, reverse=True) if call.name.startswith(prefix)), "")
    library, _, name = call.name.removeprefix(prefix).rpartition(".")
    home = nn if not library else importlib.import_module(library) if library in LIBRARIES and not prefix else None
    if home is None:
        raise EditError(
            f"'{call.name}' is no layer: '{library}' may not be called. Expected a layer of torch.nn by its bare name, "
            f"{' or '.join(f'{known}.NAME' for known in LIBRARIES)}. {_OWN_HINT}"
        )
    kind = vars(home).get(name)
    if not name.startswith("_") and isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    known = [key for key, kind in vars(home).items() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    same = [key for key in known if key.lower() == name.lower()]
    hint = f"Nearest: {same[0]!r}." if same else nearest(name, known)
    raise EditError(f"'{call.name}' is no layer of {library or 'torch.nn'}. {f'{hint} ' if hint else ''}{_OWN_HINT}")


_OWN_HINT = "A class of your own is py('FILE.py:Class', …)."


def _own_class(call: LayerCall, trust_code: bool) -> type[nn.Module]:
    reference = call.positional[0] if call.positional else None
    if not isinstance(reference, str):
        raise EditError(f"'{shortened(str(call))}' does not name a class. {_OWN_HINT}")
    kind = import_object(PYTHON + reference, trust_code=trust_code)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise EditError(f"'{reference}' is a {type(kind).__name__}, expected a class of layers (torch.nn.Module).")
    return kind


def _built(value: Any, makers: dict[str, type[nn.Module]], *, dry: bool = False) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_built(item, makers, dry=dry) for item in value)
    if isinstance(value, dict):
        return {key: _built(item, makers, dry=dry) for key, item in value.items()}
    if not isinstance(value, LayerCall):
        return value
    maker = makers[_label(value)]
    positional = _built(value.positional[1:] if value.name == OWN else value.positional, makers, dry=dry)
    keywords = _built(value.keywords, makers, dry=dry)
    if maker is nn.Sequential and keywords and not positional:
        positional, keywords = (OrderedDict(keywords),), {}
    if maker is nn.Sequential and len(positional) == 1 and isinstance(positional[0], dict):
        positional = (OrderedDict(positional[0]),)
    _check_arguments(value, maker, positional, keywords)
    # A user's class may need values in its constructor: where the meta device fails, `suppress` goes on to the CPU.
    if not dry:
        return _called(value, maker, positional, keywords)
    with torch.device("meta"), contextlib.suppress(EditError) if value.name == OWN else contextlib.nullcontext():
        return _called(value, maker, positional, keywords)
    with torch.device("cpu"):  # code that reads the values of its tensors cannot be built without memory
        return _called(value, maker, positional, keywords)


def _called(
    call: LayerCall, maker: type[nn.Module], positional: tuple[Any, ...], keywords: dict[str, Any]
) -> nn.Module:
    try:
        inspect.signature(maker.__init__).bind(None, *positional, **keywords)  # says more than the call would
        return maker(*positional, **keywords)
    except Exception as error:
        cause = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = str(cause).partition("\n")[0].rstrip(".") or type(error).__name__
        raise EditError(
            f"'{shortened(str(call))}' cannot be built: {reason}. Expected {_signature(call, maker)}."
        ) from error


def _check_arguments(
    call: LayerCall, maker: type[nn.Module], positional: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Refuse a device or dtype, and too large numbers of layers."""
    entries = list(inspect.signature(maker.__init__).parameters.values())[1:]
    names = [entry.name for entry in entries if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
    names = names or [entry.name for entry in parameters_of(maker)]
    arguments = {**dict(zip(names, positional, strict=False)), **keywords}
    if call.name != OWN and (arguments.get("device") is not None or arguments.get("dtype") is not None):
        raise EditError(
            f"'{shortened(str(call))}' says where its weights live or of which dtype they are. Leave that out, and "
            "move the layer afterwards, as in layer.to('cuda')."
        )
    inner = sum(1 for value in arguments.values() if isinstance(value, nn.Module) for _ in value.modules())
    for name in REPEATS:
        count = arguments.get(name)
        if isinstance(count, int) and (count > MAX_REPEATS or count * inner > MAX_LAYERS):
            layers, most = (count, MAX_REPEATS) if count > MAX_REPEATS else (count * inner, MAX_LAYERS)
            raise EditError(f"'{shortened(str(call))}' asks for {layers:,} layers, and {most:,} are the most.")


def _signature(call: LayerCall, maker: type[nn.Module]) -> str:
    entries = []
    for entry in parameters_of(maker):
        stars = {entry.VAR_POSITIONAL: "*", entry.VAR_KEYWORD: "**"}.get(entry.kind, "")
        default = getattr(entry.default, "__name__", repr(entry.default))
        entries.append(f"{stars}{entry.name}" + ("" if entry.default is entry.empty else f"={default}"))
    return f"{_label(call)}({', '.join(entries)})"


def _require_same(layer: nn.Module, rebuilt: nn.Module, text: str, *, tied: bool) -> None:
    """Compare what a text builds with the layer that it was read from.

    Raises:
        EditError: They differ in layers, tensors, ties or settings.
    """
    originals, copies = (dict(part.named_modules(remove_duplicate=False)) for part in (layer, rebuilt))
    unlike = f"are not those of '{text}', which is all that can be read back from it"
    if {path: type(part) for path, part in originals.items()} != {path: type(part) for path, part in copies.items()}:
        raise undescribable(layer, "", f"the layers in it {unlike}")
    if _shapes(layer) != _shapes(rebuilt):
        raise undescribable(layer, "", f"its tensors {unlike}")
    if not tied and _ties(layer) != _ties(rebuilt):
        group = min(_ties(layer) ^ _ties(rebuilt), key=sorted)
        reason = f"{' and '.join(map(repr, sorted(group)))} are one tensor, and text would untie them"
        advice = "Give each layer weights of its own, or tie them in the constructor of a class of your own."
        raise undescribable(layer, "", reason, advice)
    for path, part in copies.items():
        if "forward" in vars(originals[path]):
            raise undescribable(originals[path], path, "its forward was replaced")
        kept = vars(part) if library_name(type(part)) else {entry.name for entry in parameters_of(type(part))}
        for name in kept:
            value, own = vars(part).get(name), vars(originals[path]).get(name)
            if name == "training" or name.startswith("_") or not isinstance(value, PLAIN) or value == own:
                continue
            if value == value or own == own:  # two NaN count as equal
                raise undescribable(
                    originals[path], path, f"its '{name}' is {own!r}, and that of '{text}' is {value!r}"
                )


def _state(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the state dict, which may also hold other values (extra state)."""
    state = layer.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _shapes(layer: nn.Module) -> dict[str, Any]:
    return {name: None if is_lazy(tensor) else tuple(tensor.shape) for name, tensor in _state(layer).items()}


def _ties(layer: nn.Module) -> set[frozenset[str]]:
    """Return the groups of names that stand for one tensor."""
    names: dict[int, set[str]] = {}
    for name, tensor in _state(layer).items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
