"""Edit the dataflow of a network: truncate it, insert layers, append layers.

Every edit returns another network that shares the weights of the first, whose own structure stays as it is. Where a
forward cannot be traced, `truncate` and `append` fall back to hooks (see `detour`).
"""

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from regraft.anatomy.dataflow.graph import LAYER, Flow, ModuleCall, ancestors, live_across_cut, nodes_in
from regraft.anatomy.inputs import Arguments, Inputs, arguments_for
from regraft.anatomy.modes import unmoved_on_failure
from regraft.anatomy.paths import is_within, layer_at
from regraft.anatomy.tracing import trace
from regraft.arguments import check_arguments
from regraft.errors import EditError, ModelError
from regraft.surgery.checks import finish, prove, require_editable
from regraft.surgery.detour import detour, first_dropped, is_detoured, stop_at
from regraft.surgery.fitting import fitted, materialize_lazy
from regraft.surgery.rewired import EditedModule, prune, rewire, unused_names
from regraft.wording import for_caller


def truncate(
    model: nn.Module,
    *,
    after: str | None = None,
    drop: int | None = None,
    drop_skips: bool = False,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return `model` without what comes after a layer: its output is what that layer gave, bit for bit.

    What is no longer used is gone: layers, parameters, entries of the state dict. What is kept keeps its names.

    Args:
        model: Any module.
        after: Path of the last layer that stays. Of several calls of it, the last one counts.
        drop: Number of top-level layers to delete from the end, counted in the order of execution. A step that is no
            layer, such as a flatten in the forward, stays with the layer that it follows.
        drop_skips: Cut even inside of a residual block. The skip connections that cross the cut are lost.
        inputs: What the forward takes, for the check; guessed where not given, see `summary`.

    Raises:
        EditError: The cut crosses a skip connection, or leaves nothing to train, or `drop` is too large.
        SelectionError: No layer has the path `after`.
        Nothing was changed.

    >>> body = truncate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), drop=1)
    >>> list(body.state_dict())
    ['0.weight', '0.bias']
    """
    check_arguments(truncate, locals())
    require_editable(model)
    if (after is None) == (drop is None):
        raise EditError("truncate needs either after=PATH or drop=NUMBER. Nothing was changed.")
    if after is not None:
        layer_at(model, after)
        if not after:
            where = for_caller(python="truncate: after='' is", command="--truncate-after '' names")
            raise EditError(f"{where} the model itself, after which nothing comes. Name one of its layers.")
    elif drop is not None and drop < 1:
        raise EditError(f"drop is {drop}, expected the number of layers to delete, at least 1.")
    try:
        edited = without_rest(model, after=after, drop=drop, drop_skips=drop_skips, inputs=inputs)
    except ModelError:
        edited = stop_at(model, after=after, drop=drop, inputs=inputs)
    what = f"truncate after '{after}'" if after is not None else f"drop the last {drop} layers"
    _require_parameters(edited, model, what)
    prove(edited, model, what, inputs)
    return finish(edited, model, "truncate", new_outputs=True, after=after, drop=drop, drop_skips=drop_skips or None)


@unmoved_on_failure()
def append(model: nn.Module, *layers: nn.Module | int, inputs: Inputs | None = None) -> nn.Module:
    """Return `model` with layers on top: they take its output, one after the other.

    The new layers are top-level ones, `appended_1`, `appended_2`, …. Lazy ones (`nn.LazyLinear`) get their widths.

    Args:
        model: Any module that gives one tensor. What it gives besides while it trains (auxiliary scores) is dropped.
        *layers: Modules; or a number of classes K, for a linear layer after what it takes to make vectors of maps
            (N, C, H, W) or tokens (N, T, D).
        inputs: What the forward takes, for the shapes; guessed where not given, see `summary`.

    Raises:
        EditError: The shapes do not fit, or the output is no tensor. Nothing was changed.

    >>> append(nn.Sequential(nn.Flatten()), nn.LazyLinear(3), inputs=torch.zeros(2, 3, 4)).appended_1
    Linear(in_features=12, out_features=3, bias=True)
    """
    check_arguments(append, locals())
    require_editable(model)
    if not layers:
        raise EditError("append needs at least one layer, as in append(model, nn.Linear(512, 10)).")
    new = fitted(model, layers, inputs)
    added = dict(zip(unused_names(model, "appended", len(new)), new, strict=True))

    def change(flow: Flow) -> None:
        value = _main_output(flow, model)
        with flow.graph.inserting_before(flow.graph.output_node()):
            for name in added:
                value = flow.graph.call_module(name, (value,))
        flow.set_output(value)

    try:
        edited = (
            detour(model, added)
            if is_detoured(model)
            else rewire(model, (), change, added, arguments=arguments_given(model, inputs))
        )
    except ModelError:
        edited = detour(model, added)
    what = f"append {_listed(new)}"
    materialize_lazy(edited, added, prove(edited, model, what, inputs), what)
    return finish(edited, model, "append", new_outputs=True, layers=list(new))


def insert(
    model: nn.Module,
    new: nn.Module,
    *,
    after: str | None = None,
    before: str | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return `model` with a layer put in after or before another; wherever that one is called, the new one is as well.

    The new layer is a top-level one, `inserted_1`, so that all others keep their names. A lazy one gets its widths.

    Args:
        model: A module that can be traced.
        new: The layer; it takes one tensor and gives one.
        after: Path of the layer whose output it takes.
        before: Path of the layer whose first input it takes.
        inputs: What the forward takes, for the check; guessed where not given, see `summary`.

    Raises:
        EditError: The shapes do not fit, the layer is never called or gives no single tensor, or the forward cannot be
            traced.
        SelectionError: No layer has that path.
        Nothing was changed.

    >>> wider = insert(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.ReLU(), after="0")
    >>> [name for name, _ in wider.named_children()]
    ['0', '1', 'inserted_1']
    """
    check_arguments(insert, locals())
    require_editable(model)
    if (after is None) == (before is None):
        raise EditError("insert needs either after=PATH or before=PATH. Nothing was changed.")
    path, word = (after, "after") if after is not None else (str(before), "before")
    place = f"{word} '{path}'"
    layer_at(model, path)
    if not path:
        raise EditError(f"insert: {word}='' is the model itself. Name one of its layers, or use append.")
    (name,) = unused_names(model, "inserted", 1)
    fitted(model, (new,), inputs)

    def change(flow: Flow) -> None:
        module_calls = calls_within(flow, path)
        if not module_calls and not flow.training:
            raise EditError(f"cannot insert {place}: that layer is never called. Nothing was changed.")
        if not flow.calls_of(path):  # a list of layers, which has one end and one beginning
            module_calls = module_calls[-1:] if after is not None else module_calls[:1]
        for call in module_calls:
            _insert_call(flow, name, call, is_after=after is not None, place=place)

    try:
        arguments = arguments_given(model, inputs)
        edited = rewire(model, layers_to_trace(model, path), change, {name: new}, closed=path, arguments=arguments)
    except ModelError as error:
        if not _is_called(model, path, inputs):
            raise EditError(f"cannot insert {place}: that layer is never called. Nothing was changed.") from error
        raise EditError(
            f"cannot insert {place}: {str(error).rstrip('.')}. Only replace, replace_head, remove, truncate and "
            "append work on a network that cannot be traced. Nothing was changed."
        ) from error
    what = f"insert {type(new).__name__} {place}"
    materialize_lazy(edited, {name: new}, prove(edited, model, what, inputs), what)
    return finish(edited, model, "insert", new_outputs=False, new=new, after=after, before=before)


def without_rest(
    model: nn.Module,
    *,
    after: str | None = None,
    drop: int | None = None,
    drop_skips: bool = False,
    inputs: Inputs | None = None,
) -> EditedModule:
    """Truncate a network by its graph, whatever is frozen of what is left, and without a check; see `truncate`.

    Raises:
        EditError: The cut crosses a skip connection, or `drop` is too large.
        ModelError: The forward cannot be traced.
    """
    if is_detoured(model):
        raise ModelError("its forward stops by a hook")

    def change(flow: Flow) -> None:
        value = _value_after(flow, after) if after is not None else _value_before_the_last(flow, drop or 0, model)
        cut = nodes_in(value)
        over = [] if drop_skips else live_across_cut(flow.graph, cut)
        if over:
            raise EditError(crossed(flow, after, cut, over))
        flow.set_output(value)
        order = list(flow.graph.nodes)
        end = max((order.index(node) for node in cut), default=0)
        for node in reversed(order[end + 1 :]):
            if node.op != "output":
                flow.graph.erase_node(node)

    opened = layers_to_trace(model, after) if after is not None else ()
    edited = rewire(model, opened, change, closed=after, arguments=arguments_given(model, inputs))
    prune(edited)
    return edited


def arguments_given(model: nn.Module, inputs: Inputs | None) -> Arguments | None:
    """Return the arguments for `capture`; None without `inputs`: all parameters without a default become inputs."""
    return None if inputs is None else arguments_for(model, inputs=inputs)


def layers_to_trace(model: nn.Module, path: str) -> list[str]:
    """List the layers to trace so that the graph shows the calls of the layer at `path`: those around it."""
    is_called = type(model.get_submodule(path)).forward is not nn.Module.forward
    return ancestors(path) if is_called else [*ancestors(path), path]


def calls_within(flow: Flow, path: str) -> list[ModuleCall]:
    """List the calls of a layer; of a list of layers, which is not called itself, the calls in it."""
    return flow.calls_of(path) or [call for call in flow.module_calls if is_within(call.path, path)]


def _value_after(flow: Flow, path: str) -> Any:
    module_calls = calls_within(flow, path)
    if not module_calls:
        raise EditError(f"cannot truncate after '{path}': that layer is never called. Nothing was changed.")
    return module_calls[-1].output


def _value_before_the_last(flow: Flow, drop: int, model: nn.Module) -> fx.Node:
    """Return the input of the first of the last `drop` top-level layers."""
    first_calls: dict[str, fx.Node] = {}
    for node in flow.graph.nodes:
        if node.op == "call_module":
            first_calls.setdefault(str(node.target).partition(".")[0], node)
    first = first_dropped(model, list(first_calls), drop)
    inputs = nodes_in((first_calls[first].args, first_calls[first].kwargs))
    if len(inputs) != 1:
        other = for_caller(python="truncate(model, after=PATH)", command="--truncate-after LAYER")
        raise EditError(
            f"cannot drop {drop} layers: '{first}' takes {len(inputs)} values, which are no single output. "
            f"Use {other}. Nothing was changed."
        )
    return inputs[0]


def crossed(
    flow: Flow, after: str | None, cut: Collection[fx.Node], over: Collection[fx.Node], *, has_choice: bool = True
) -> str:
    """Write the message about values that cross a cut and the nearest clean cuts; `has_choice`: they may be dropped."""
    order = {node: position for position, node in enumerate(flow.graph.nodes)}
    here = max(order[node] for node in cut)
    outputs = [(call.path, call.output) for call in flow.module_calls if isinstance(call.output, fx.Node)]
    clean = sorted((order[node], path) for path, node in outputs if not live_across_cut(flow.graph, [node]))
    before = [path for position, path in clean if position < here][-1:]
    behind = [path for position, path in clean if position > here][:1]
    makers = {node: path for path, node in reversed(outputs)}
    names = ", ".join(f"'{makers.get(node, node.name)}'" for node in over)
    users = {str(user.meta.get(LAYER, "")) for node in over for user in node.users if order[user] > here}
    joined = " and ".join(f"'{path}'" for path in sorted(users) if path) or "its own forward"
    nearest = " and ".join(f"'{path}'" for path in [*before, *behind])
    drop_skips = for_caller(python="drop_skips=True", command="a plan with drop_skips = true")
    return (
        f"cannot cut after '{after}': a skip connection crosses the cut. What {names} gives is used after it as well, "
        f"in {joined}. "
        + (f"Nearest clean cuts: after {nearest}. " if nearest else "")
        + (f"Or pass {drop_skips} to lose the connection. " if has_choice else "")
        + "Nothing was changed."
    )


def _main_output(flow: Flow, model: nn.Module) -> fx.Node:
    value = flow.output
    if isinstance(value, fx.Node) and isinstance(value.target, type):  # a named tuple or the like that it makes
        value = value.args or value.kwargs
    if isinstance(value, fx.Node):
        return value
    nodes = nodes_in(value)
    if flow.training and nodes:
        return nodes[0]
    raise EditError(
        f"cannot append to {type(model).__name__}: it gives a {type(value).__name__} of {len(nodes)} values, expected "
        "one tensor. Truncate it after the layer whose output you want first. Nothing was changed."
    )


def _is_called(model: nn.Module, path: str, inputs: Inputs | None) -> bool:
    """Return whether the forward calls a layer; also True where the forward cannot be run, so that it is unknown."""
    try:
        return any(is_within(call.path, path) for call in trace(model, inputs=inputs).calls)
    except ModelError:
        return True


def _insert_call(flow: Flow, name: str, call: ModuleCall, *, is_after: bool, place: str) -> None:
    """Insert a call of the new layer on the output of another call, or on its first input."""
    value = call.output if is_after else next(iter((*call.args, *call.kwargs.values())), None)
    if not isinstance(value, fx.Node):
        raise EditError(
            f"cannot insert {place}: that layer {'gives' if is_after else 'takes'} a {type(value).__name__}, expected "
            "one tensor. Nothing was changed."
        )
    if is_after:
        with flow.graph.inserting_after(value):
            new = flow.graph.call_module(name, (value,))
        value.replace_all_uses_with(new, lambda user: user is not new)  # its own input stays
    else:
        with flow.graph.inserting_before(call.output):
            call.output.replace_input_with(value, flow.graph.call_module(name, (value,)))


def _require_parameters(edited: nn.Module, model: nn.Module, what: str) -> None:
    if next(edited.parameters(), None) is None and next(model.parameters(), None) is not None:
        raise EditError(f"cannot {what}: no layer with parameters would be left. Nothing was changed.")


def _listed(layers: Collection[nn.Module]) -> str:
    return ", ".join(str(layer).partition("\n")[0].removesuffix("(") for layer in layers)
