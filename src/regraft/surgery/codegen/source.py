"""Write a network out as plain PyTorch source code, which runs without regraft."""

import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from regraft.anatomy.dataflow.graph import Flow, capture
from regraft.anatomy.inputs import Arguments, Inputs, arguments_for
from regraft.anatomy.modes import in_mode, preserved_randomness
from regraft.anatomy.shape_copies import aliased_copy, shared_copy
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.card import card_of
from regraft.errors import EditError, ForwardError, ModelError
from regraft.surgery.checks import require_editable
from regraft.surgery.codegen.forward_body import POOL, Choice, ForwardWriter, merged, simplify
from regraft.surgery.codegen.init_body import HELPERS, InitWriter, Layers, require_no_hooks
from regraft.surgery.codegen.literals import UNPACK, WIDTH, ImportTable, wrapped
from regraft.surgery.detour import is_detoured
from regraft.version import __version__

STANDARD = frozenset({"base64", "collections", "math", "operator", "zlib"})


def to_source(model: nn.Module, *, class_name: str | None = None, inputs: Inputs | None = None) -> str:
    """Write `model` as a Python file with one class, which needs torch alone, and torchvision or timm where it does.

    The class has the state dict of `model`: the same names, shapes and dtypes, shared tensors shared. With the same
    weights it gives the same outputs, bit for bit, in evaluation and (from the same seed) in training. Before the text
    is returned, the class was made, given the weights, and run on `inputs` beside `model`, in evaluation. Tensors that
    no state dict holds stand in the file.

    What cannot be written: a forward that branches on values or shapes; forward hooks, such as those of weight norm;
    what is not traced and comes from other libraries than torch, torchvision, timm and transformers. What is not
    written: weights, `requires_grad` flags and what keeps frozen layers in evaluation, checks (`torch._assert`), class
    names of blocks (but in comments), arguments of the forward that have defaults, backward hooks, the device.

    Args:
        model: A module that can be traced, edited or not.
        class_name: Name of the class in the file; that of the class of `model` where not given.
        inputs: What the forward takes, for the check; random and of a guessed shape where not given, see `summary`.

    Returns:
        The text of the file. The same model gives the same text.

    Raises:
        EditError: The network cannot be written as source; the message says which layer and why. Nothing was written.

    >>> print(to_source(nn.Sequential(nn.Linear(4, 2), nn.ReLU())).partition("class ")[2])
    Sequential(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(4, 2))
            self.add_module("1", nn.ReLU())
    <BLANKLINE>
        def forward(self, input):
            x = self.get_submodule("0")(input)
            return self.get_submodule("1")(x)
    <BLANKLINE>
    """
    check_arguments(to_source, locals())
    require_editable(model)
    name = class_name or type(model).__name__
    if not name.isidentifier():
        raise EditError(f"'{name}' is no name for a class. Pass class_name=. Nothing was written.")
    if is_detoured(model):
        raise EditError(
            f"{type(model).__name__} cannot be written as source: it was cut or extended by hooks, as its forward "
            "cannot be traced. Nothing was written."
        )
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise EditError("a lazy layer has no shapes yet. Run the model once on an input first. Nothing was written.")
    require_no_hooks(model)
    try:
        text = _written(model, name)
    except EditError as error:
        raise EditError(f"{type(model).__name__} cannot be written as source: {error}. Nothing was written.") from error
    _prove(text, name, model, inputs)
    return text


def _written(model: nn.Module, class_name: str) -> str:
    prepared = _with_plain_norms(model)
    layers = Layers(prepared)
    flows = _flows(prepared, layers)
    nodes = [node for flow in flows for node in flow.graph.nodes]
    targets = {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}
    targets |= {f"{path}.training".lstrip(".") for path in _modes(flows)}
    inputs = [str(node.target) for node in flows[0].graph.nodes if node.op == "placeholder"]
    names = ImportTable((class_name, *POOL, *inputs))
    constants = {name: tensor for flow in flows for name, tensor in flow.constants.items()}
    blueprint = InitWriter(prepared, layers, targets, constants, names)
    forwards = [ForwardWriter(flow, blueprint.attribute, names, model).lines() for flow in flows]
    made = blueprint.lines()
    body = [f"class {class_name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    body += [line for statement in made for line in wrapped(statement, 8)]
    signature = ", ".join(["self", *inputs])
    if len(forwards) == 2:
        mode = blueprint.attribute(f"{flows[0].mode_switch}.training".lstrip("."))
        call = f"({', '.join(inputs)})"
        body += ["", f"    def forward({signature}):"]
        body += [f"        return self._forward_train{call} if {mode} else self._forward_eval{call}"]
    titles = ["forward"] if len(forwards) == 1 else ["_forward_eval", "_forward_train"]
    for title, lines in zip(titles, forwards, strict=True):
        body += ["", f"    def {title}({signature}):"]
        body += [part for line in lines for part in (wrapped(line, 8) if line else [""])]
    return _file(model, class_name, body, names, blueprint)


def _file(model: nn.Module, class_name: str, body: list[str], names: ImportTable, blueprint: InitWriter) -> str:
    tensors = blueprint.constants.lines
    blocks = [HELPERS[name].strip() for name in sorted(blueprint.helpers)]
    blocks += [UNPACK.strip()] if tensors else []
    blocks.append("\n".join(body))
    blocks += ["\n".join(["# Tensors that no state dict holds.", *tensors])] if tensors else []
    imports = {*names.imports, "from torch import nn"}
    imports |= {"import torch"} if any("torch." in block for block in blocks) else set()
    imports |= {"import base64", "import zlib"} if tensors else set()
    top = ["\n".join(_header(model, class_name)), "\n".join(_sorted(imports))]
    top += ["\n".join(names.definitions)] if names.definitions else []
    return "\n\n\n".join(["\n\n".join(top), *blocks]) + "\n"


def _header(model: nn.Module, class_name: str) -> list[str]:
    recipe = card_of(model).recipe
    origin = recipe.source.name if recipe else type(model).__name__
    made = [f"{class_name}: written by regraft {__version__} from {origin}, with torch {torch.__version__}."]
    made += [f"Edit: {step}" for step in (recipe.steps if recipe else ())]
    lines = [f"# {line}" for text in made for line in textwrap.wrap(text, WIDTH - 2, subsequent_indent="    ")]
    return [
        *lines,
        "#",
        "# Weights come from the state dict of the network that this was written from:",
        "#",
        f"#     model = {class_name}()",
        '#     model.load_state_dict(torch.load("weights.pth"))',
        "#     model.eval()",
    ]


def _sorted(imports: set[str]) -> Iterator[str]:
    """Sort imports as linters want them: the standard library first, and one line for each module."""
    lines: dict[str, list[str]] = {}
    for line in imports:
        module, _, name = line.removeprefix("from ").removeprefix("import ").partition(" import ")
        lines.setdefault(module if name else f"import {module}", []).append(name)
    order = sorted(lines, key=lambda head: (not head.startswith("import "), head))
    for is_standard in (True, False):
        chosen = [head for head in order if (_root(head) in STANDARD) == is_standard]
        for head in chosen:
            names = sorted(lines[head], key=lambda name: (name.islower(), name))
            line = head if head.startswith("import ") else f"from {head} import {', '.join(names)}"
            if len(line) > WIDTH:
                line = "\n".join([f"from {head} import (", *(f"    {name}," for name in names), ")"])
            yield line
        if is_standard and chosen:
            yield ""


def _root(head: str) -> str:
    return head.removeprefix("import ").partition(".")[0]


def _flows(model: nn.Module, layers: Layers) -> list[Flow]:
    """Trace a network: one graph, or two where evaluation and training differ in more than plain values."""
    try:
        flows = [capture(model, layers.opened)]
        if flows[0].mode_switch is not None:
            flows.append(capture(model, layers.opened, training=True))
    except ModelError as error:
        met = (why for path, why in layers.reasons.items() if f"layer '{path}' " in str(error))
        raise EditError(f"{error}{''.join(f'; nor can it be imported: {why}' for why in met)}") from error
    for flow in flows:
        simplify(flow, model)
    return flows[:1] if len(flows) == 2 and merged(*flows) else flows


def _modes(flows: list[Flow]) -> set[str]:
    """List the layers whose mode the source asks for."""
    if len(flows) == 2:
        return {flows[0].mode_switch or ""}
    return {choice.path for node in flows[0].graph.nodes for choice in _choices((node.args, node.kwargs))}


def _choices(value: Any) -> Iterator[Any]:
    if isinstance(value, Choice):
        yield value
    elif isinstance(value, dict):
        yield from (found for inner in value.values() for found in _choices(inner))
    elif isinstance(value, (tuple, list)):
        yield from (found for inner in value for found in _choices(inner))


def _with_plain_norms(model: nn.Module) -> nn.Module:
    """Return `model`, with its structure left alone, so that timm's norms with an activation show both of them."""
    paths = [path for path, layer in model.named_modules() if path and _is_norm_with_activation(layer)]
    if not paths:
        return model
    prepared = shared_copy(model)
    for path in paths:
        layer = prepared.get_submodule(path)
        vars(layer)["forward"] = partial(_norm_then_activation, path, layer)
    return prepared


def _is_norm_with_activation(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__module__ == "timm.layers.norm_act" and kind.__name__ == "BatchNormAct2d"


def _norm_then_activation(path: str, layer: Any, x: fx.Proxy) -> Any:
    normalized = x.tracer.create_proxy("call_module", path, (x,), {})
    return layer.act(layer.drop(normalized))


def _prove(text: str, class_name: str, model: nn.Module, inputs: Inputs | None) -> None:
    """Make the class, hold its state dict against that of `model`, and run both on shapes.

    Raises:
        EditError: They differ.
    """
    scope: dict[str, Any] = {"__name__": "<source>"}
    kind = type(model).__name__
    try:
        exec(compile(text, "<source>", "exec"), scope)  # made from the graph and the layers above
        with torch.device("meta"), preserved_randomness():
            made = scope[class_name]()
    except Exception as error:
        raise EditError(
            f"{kind} cannot be written as source: the class that came out cannot be made: {error}. Nothing was written."
        ) from error
    ours, theirs = made.state_dict(), model.state_dict()
    for name in [*theirs, *ours]:
        if name not in ours or name not in theirs or _form(ours[name]) != _form(theirs[name]):
            raise EditError(
                f"{kind} cannot be written as source: '{name}' would be {_form(ours.get(name))}, and is "
                f"{_form(theirs.get(name))}. Nothing was written."
            )
    given = arguments_for(model, inputs=inputs)  # guessed from the original, as the copy says less about itself
    try:
        expected = trace(model, inputs=inputs)
    except ForwardError:
        return
    try:
        found = trace(made, inputs=given.kwargs or given.args)
    except ForwardError as error:
        raise EditError(
            f"{kind} cannot be written as source: what came out does not run: {error} Nothing was written."
        ) from error
    shapes = [next(call.output_shapes for call in one.calls if call.path == "") for one in (expected, found)]
    if shapes[0] != shapes[1]:
        raise EditError(f"{kind} cannot be written as source: it would give {shapes[1]}, not {shapes[0]}.")
    has_values = not any(tensor.is_meta for tensor in theirs.values())
    if has_values and not _gives_the_same(scope[class_name], model, given):
        raise EditError(
            f"{kind} cannot be written as source: what came out gives other values, probably as its forward changes in "
            "place (x += …) what has a second name. Nothing was written."
        )


def _gives_the_same(maker: Any, model: nn.Module, given: Arguments) -> bool:
    """Run the class and a twin of `model` on the same inputs, in evaluation, and compare bit by bit."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def run(network: nn.Module) -> list[Any]:
        torch.manual_seed(0)
        with torch.no_grad():
            return tree_leaves(network(*fed.args, **fed.kwargs))

    with preserved_randomness(0):
        made = maker()
        made.load_state_dict(model.state_dict())
        values = given.with_values(device)
        fed = values.with_values(device)  # copies, as a forward may write to its input
        try:
            expected = run(aliased_copy(model))
        except Exception as error:  # a network of the user's own, on inputs of the user's own
            raise EditError(
                f"{type(model).__name__} fails on these inputs: {error}. Pass others. Nothing was written."
            ) from error
        fed = values.with_values(device)
        if _equal(run(in_mode(made.to(device), False)), expected):
            return True
        fed = values.with_values(device)
        return not _equal(run(aliased_copy(model)), expected)  # a network that differs from itself proves nothing


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)]
    return all(a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in tensors)


def _form(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
