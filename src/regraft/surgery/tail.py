"""The back of a network: what comes after a layer, as a network of its own."""

from torch import fx, nn

from regraft.anatomy.graph import Flow, crossing
from regraft.anatomy.inputs import Inputs, arguments_for
from regraft.anatomy.values import BATCHES, Sizes, compute_values, sizes_of, value_key
from regraft.errors import EditError, ModelError
from regraft.surgery.edits import crossed, opened_for, visits_within
from regraft.surgery.middle import begin_at
from regraft.surgery.rewired import Rewired, prune, rewire


def tail(model: nn.Module, after: str, *, inputs: Inputs | None = None) -> Rewired:
    """Return what comes after a layer as a network whose one input is what that layer gives.

    Sizes that the forward reads before the cut are written in as numbers, so the result holds for that size of images.

    Raises:
        EditError: A skip connection crosses the cut, or the forward cannot be traced. Nothing was changed.
    """
    found: list[Sizes] = []

    def change(flow: Flow) -> None:
        visits = visits_within(flow, after)
        value = visits[-1].output if visits else None
        if not isinstance(value, fx.Node):
            raise EditError(f"cannot begin after '{after}': it gives no single tensor. Nothing was changed.")
        over = crossing(flow.graph, [value])
        if over:
            raise EditError(crossed(flow, after, [value], over, has_choice=False))
        if not found:  # those of evaluation hold for training as well
            found.append(sizes_of(flow.graph, [compute_values(model, flow, count) for count in BATCHES]))
        begin_at(flow.graph, [value_key(value)], found[0], model.get_submodule)

    try:
        back = rewire(
            model, opened_for(model, after), change, closed=after, arguments=arguments_for(model, inputs=inputs)
        )
    except ModelError as error:
        raise EditError(f"cannot begin after '{after}': {str(error).rstrip('.')}. Nothing was changed.") from error
    prune(back)
    return back
