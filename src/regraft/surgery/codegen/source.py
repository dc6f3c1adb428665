"""Write a network as plain PyTorch source code, which runs without regraft.

    model ──► Layers        which layers are leaves (one constructor call each), which are traced
          ──► capture       one graph, or one for each mode
          ──► InitWriter    self.fc = nn.Linear(4, 2)            the layers, under the same paths
          ──► ForwardWriter return self.fc(x.flatten(1))         the graph, as statements
          ──► _file         header, imports, helpers, class
          ──► _verify       makes the class and compares it with the model

The text is written from the layers and the traced graph, not copied from the files of the model's classes: those import
their own packages and branch on options, and know nothing of an edit. `GraphModule.to_folder` of torch.fx
pickles the modules that it cannot print, and writes one line for each operation. `torch.export` saves ATen operators,
which nobody edits by hand.

The price is that constructor arguments have to be read back from attributes, and a forward from one trace. Either can
be wrong where a class does something unusual. So the text is run before it is returned: the state dicts have to be of
the same names, shapes and dtypes, and the outputs equal bit by bit. What cannot be written is an error, never a guess.
"""

import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from regraft.anatomy.dataflow.graph import Flow, capture
from regraft.anatomy.inputs import Arguments, Inputs, arguments_for
from regraft.anatomy.modes import in_mode, preserved_randomness
from regraft.anatomy.shape_copies import aliased_copy, shared_copy
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.card import card_of
from regraft.errors import EditError, ForwardError, ModelError
from regraft.surgery.checks import require_editable
from regraft.surgery.codegen.forward_body import POOL, BranchChoice, ForwardWriter, merged, simplify
from regraft.surgery.codegen.init_body import HELPERS, InitWriter, Layers, require_no_hooks
from regraft.surgery.codegen.literals import UNPACK, WIDTH, ImportTable, wrapped
from regraft.surgery.detour import is_detoured
from regraft.torch_internals import tree_leaves
from regraft.version import __version__

FUSED_NORM = ("timm.layers.norm_act", "BatchNormAct2d")  # module and name of its class


def to_source(model: nn.Module, *, class_name: str | None = None, inputs: Inputs | None = None) -> str:
    """Write `model` as a Python file with one class, which imports only torch, and torchvision or timm where needed.

    The class has the state dict of `model`: the same names, shapes and dtypes, shared tensors shared. With the same
    weights it gives the same outputs, bit for bit, in evaluation mode and (from the same seed) in training mode. Before
    the text is returned, the class is created, loaded with the weights, and run on `inputs` beside `model`, in
    evaluation mode. Tensors that no state dict holds stand in the file.

    What cannot be written: a forward that branches on values or shapes; forward hooks, such as those of weight norm;
    leaf layers and functions from other libraries than torch, torchvision, timm and transformers. What is not written:
    weights, `requires_grad` flags and pins of frozen layers, checks (`torch._assert`), class names of blocks (except in
    comments), arguments of the forward that have defaults, backward hooks, the device.

    Args:
        model: A module that can be traced, edited or not.
        class_name: Name of the class in the file. Default: the name of `model`'s class.
        inputs: What the forward takes, for the check. Default: random values of a guessed shape, see `summary`.

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
        text = _source_text(model, name)
        _verify(text, name, model, inputs)
    except EditError as error:
        raise EditError(f"{type(model).__name__} cannot be written as source: {error}. Nothing was written.") from error
    return text


def _source_text(model: nn.Module, class_name: str) -> str:
    """Write the file, unchecked."""
    prepared = _with_plain_norms(model)
    layers = Layers(prepared)
    flows = _flows(prepared, layers)
    nodes = [node for flow in flows for node in flow.graph.nodes]
    targets = {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}
    targets |= {f"{path}.training".lstrip(".") for path in _modes(flows)}
    inputs = [str(node.target) for node in flows[0].graph.nodes if node.op == "placeholder"]
    # Imports must not take the names of inputs and variables, or a function would be hidden by a value.
    names = ImportTable((class_name, *POOL, *inputs))
    constants = {name: tensor for flow in flows for name, tensor in flow.constants.items()}
    init = InitWriter(prepared, layers, targets, constants, names)
    forwards = [ForwardWriter(flow, init.attribute, names, model).lines() for flow in flows]
    statements = init.lines()
    body = [f"class {class_name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    body += [line for statement in statements for line in wrapped(statement, 8)]
    signature = ", ".join(["self", *inputs])
    if len(forwards) == 2:
        mode = init.attribute(f"{flows[0].mode_switch}.training".lstrip("."))
        call = f"({', '.join(inputs)})"
        body += ["", f"    def forward({signature}):"]
        body += [f"        return self._forward_train{call} if {mode} else self._forward_eval{call}"]
    titles = ["forward"] if len(forwards) == 1 else ["_forward_eval", "_forward_train"]
    for title, lines in zip(titles, forwards, strict=True):
        body += ["", f"    def {title}({signature}):"]
        body += [part for line in lines for part in (wrapped(line, 8) if line else [""])]
    return _file(model, class_name, body, names, init)


def _file(model: nn.Module, class_name: str, body: list[str], names: ImportTable, init: InitWriter) -> str:
    """Put the parts of the file together: header, imports, helpers, the class, tensors."""
    tensors = init.constants.lines
    blocks = [HELPERS[name].strip() for name in sorted(init.helpers)]
    blocks += [UNPACK.strip()] if tensors else []
    blocks.append("\n".join(body))
    # Below the class, which reads them only when it is instantiated: a reader meets the class first.
    blocks += ["\n".join(["# Tensors that no state dict holds.", *tensors])] if tensors else []
    imports = {*names.imports, "from torch import nn"}
    imports |= {"import torch"} if any("torch." in block for block in blocks) else set()
    imports |= {"import base64", "import zlib"} if tensors else set()
    top = ["\n".join(_header(model, class_name)), "\n".join(_sorted_imports(imports))]
    top += ["\n".join(names.definitions)] if names.definitions else []
    return "\n\n\n".join(["\n\n".join(top), *blocks]) + "\n"


def _header(model: nn.Module, class_name: str) -> list[str]:
    recipe = card_of(model).recipe
    origin = recipe.source.name if recipe else type(model).__name__
    notes = [f"{class_name}: written by regraft {__version__} from {origin}, with torch {torch.__version__}."]
    notes += [f"Edit: {step}" for step in (recipe.steps if recipe else ())]
    lines = [f"# {line}" for text in notes for line in textwrap.wrap(text, WIDTH - 2, subsequent_indent="    ")]
    return [
        *lines,
        "#",
        "# Weights come from the state dict of the network that this was written from:",
        "#",
        f"#     model = {class_name}()",
        '#     model.load_state_dict(torch.load("weights.pth"))',
        "#     model.eval()",
    ]


def _sorted_imports(imports: set[str]) -> Iterator[str]:
    """Sort imports as linters want them: the standard library first, and one line for each module."""
    # By module, names of `from` imports; a plain import is kept under "import MODULE", with an empty name.
    lines: dict[str, list[str]] = {}
    for line in imports:
        module, _, name = line.removeprefix("from ").removeprefix("import ").partition(" import ")
        lines.setdefault(module if name else f"import {module}", []).append(name)
    order = sorted(lines, key=lambda module: (not module.startswith("import "), module))
    for is_standard in (True, False):
        roots = {module: module.removeprefix("import ").partition(".")[0] for module in order}
        modules = [module for module in order if (roots[module] in sys.stdlib_module_names) == is_standard]
        for module in modules:
            names = sorted(lines[module], key=lambda name: (name.islower(), name))
            line = module if module.startswith("import ") else f"from {module} import {', '.join(names)}"
            if len(line) > WIDTH:
                line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
            yield line
        if is_standard and modules:
            yield ""


def _flows(model: nn.Module, layers: Layers) -> list[Flow]:
    """Trace a network: one graph, or two where evaluation and training differ in more than plain values."""
    try:
        flows = [capture(model, layers.traced)]
        if flows[0].mode_switch is not None:
            flows.append(capture(model, layers.traced, training=True))
    except ModelError as error:
        # A layer is traced only where it could not be one constructor call, so both reasons are told.
        reasons = (why for path, why in layers.reasons.items() if f"layer '{path}' " in str(error))
        raise EditError(f"{error}{''.join(f'; nor can it be imported: {why}' for why in reasons)}") from error
    for flow in flows:
        simplify(flow, model)
    return flows[:1] if len(flows) == 2 and merged(*flows) else flows


def _modes(flows: list[Flow]) -> set[str]:
    """Return the paths of the layers whose `.training` the source reads."""
    if len(flows) == 2:
        return {flows[0].mode_switch or ""}
    leaves = (leaf for node in flows[0].graph.nodes for leaf in tree_leaves((node.args, node.kwargs)))
    return {leaf.path for leaf in leaves if isinstance(leaf, BranchChoice)}


def _with_plain_norms(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose fused norms of timm's are two operations in a trace: the norm and its activation.

    `model` itself where it has none.
    """
    kinds = {path: type(layer) for path, layer in model.named_modules() if path}
    paths = [path for path, kind in kinds.items() if (kind.__module__, kind.__name__) == FUSED_NORM]
    if not paths:
        return model
    prepared = shared_copy(model)
    for path in paths:
        layer = prepared.get_submodule(path)
        # On the instance: the class is timm's, and other networks use it.
        vars(layer)["forward"] = partial(_norm_then_activation, path, layer)
    return prepared


def _norm_then_activation(path: str, layer: Any, x: fx.Proxy) -> Any:
    # timm's class derives from nn.BatchNorm2d, so the node of the norm stands for a call of that, under the same path.
    normalized = x.tracer.create_proxy("call_module", path, (x,), {})
    return layer.act(layer.drop(normalized))


def _verify(text: str, class_name: str, model: nn.Module, inputs: Inputs | None) -> None:
    """Create the class and compare it with `model`: state dicts, output shapes, and values where `model` has any.

    Raises:
        EditError: They differ.
    """
    scope: dict[str, Any] = {"__name__": "<source>"}
    try:
        exec(compile(text, "<source>", "exec"), scope)  # text of our own, from the graph and the layers above
        with torch.device("meta"), preserved_randomness():
            written = scope[class_name]()
    except Exception as error:
        raise EditError(f"the class that came out cannot be made: {error}") from error
    state, expected_state = written.state_dict(), model.state_dict()
    for name in [*expected_state, *state]:
        if name not in state or name not in expected_state or _form(state[name]) != _form(expected_state[name]):
            raise EditError(f"'{name}' would be {_form(state.get(name))}, and is {_form(expected_state.get(name))}")
    arguments = arguments_for(model, inputs=inputs)  # guessed from the original, which has a card and a configuration
    try:
        expected = trace(model, inputs=inputs)
    except ForwardError:  # the model fails on these inputs as well, so its outputs cannot be compared
        return
    try:
        actual = trace(written, inputs=arguments.kwargs or arguments.args)
    except ForwardError as error:
        raise EditError(f"what came out does not run: {str(error).rstrip('.')}") from error
    shapes = [next(call.output_shapes for call in run.calls if call.path == "") for run in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise EditError(f"it would give {shapes[1]}, not {shapes[0]}")
    # Shapes first: they cost nothing, and say more about what is wrong than values that differ.
    has_values = not any(tensor.is_meta for tensor in expected_state.values())
    if has_values and not _outputs_agree(scope[class_name], model, arguments):
        raise EditError(
            "what came out gives other values, probably as its forward changes in place (x += …) what has a second name"
        )


def _outputs_agree(maker: Any, model: nn.Module, arguments: Arguments) -> bool:
    """Run the class and a copy of `model` on the same inputs in evaluation mode, and compare them bit by bit."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def run(network: nn.Module) -> list[Any]:
        torch.manual_seed(0)
        with torch.no_grad():
            return tree_leaves(network(*fed.args, **fed.kwargs))

    with preserved_randomness(0):
        written = maker()
        written.load_state_dict(model.state_dict())
        values = arguments.with_values(device)
        fed = values.with_values(device)  # copies, as a forward may write to its input
        try:
            expected = run(aliased_copy(model))
        except Exception as error:  # the user's network on the user's inputs
            raise EditError(f"it fails on these inputs: {error}. Pass others") from error
        fed = values.with_values(device)
        if _equal(run(in_mode(written.to(device), False)), expected):
            return True
        fed = values.with_values(device)
        return not _equal(run(aliased_copy(model)), expected)  # a network that differs from itself proves nothing


def _equal(outputs: list[Any], expected: list[Any]) -> bool:
    pairs = zip(outputs, expected, strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)]
    return all(a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in tensors)


def _form(tensor: torch.Tensor | None) -> str:
    """Write the shape and dtype of a tensor, for comparison and for messages."""
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
