"""Compute shapes and costs of all values of a graph without real data, and match values between two graphs."""

import hashlib
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

from regraft.anatomy.dataflow.graph import Flow, is_size
from regraft.anatomy.inputs import Arguments
from regraft.anatomy.modes import preserved_randomness, silenced
from regraft.anatomy.recording import flop_counter
from regraft.anatomy.shape_copies import SHAPE_ONLY_COPIES
from regraft.anatomy.tracing import FAKES, unfused_attention

Values = dict[fx.Node, Any]
Sizes = dict[str, tuple[Any, Any]]

BATCHES = (2, 3)  # two batch sizes: a dimension that differs between the runs follows the batch


def compute_values(model: nn.Module, flow: Flow, count: int) -> Values:
    """Compute every value of a graph on shapes alone, for a batch of `count` images like those of `flow.inputs`."""
    return _run(model, flow, count, counts=False)[0]


def compute_costs(model: nn.Module, flow: Flow) -> tuple[list[Values], dict[fx.Node, int]]:
    """Compute every value for both of `BATCHES`, and the multiply-adds of each node for one image."""
    few, many = (_run(model, flow, count, counts=True) for count in BATCHES)
    # FLOPs are linear in the batch: f(1) = 2 f(2) - f(3), which keeps what does not grow with the batch. A multiply-add
    # is two FLOPs.
    costs = {node: (2 * few[1][node] - many[1][node]) // 2 for node in few[1]}
    return [few[0], many[0]], costs


def _run(model: nn.Module, flow: Flow, count: int, *, counts: bool) -> tuple[Values, dict[fx.Node, int]]:
    """Return every value of a graph, and the FLOPs of each node; 0 for all where not `counts`."""
    problem: Exception | None = None
    unfused = unfused_attention if counts else nullcontext
    for shape_only_copy in SHAPE_ONLY_COPIES:
        try:
            with (
                preserved_randomness(),
                silenced(FAKES),
                unfused(),
                shape_only_copy(model) as duplicate,
                torch.no_grad(),
            ):
                for name, tensor in flow.constants.items():
                    setattr(duplicate, name, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
                runner = Interpreter(duplicate, flow.graph)
                with runner.counter if counts else nullcontext():
                    runner.run(*Arguments(flow.inputs).of_batch(count).args)
                return runner.env, runner.operations
        except Exception as error:
            problem = error
    assert problem is not None
    raise problem


def sizes_of(graph: fx.Graph, values: list[Values]) -> Sizes:
    """Return each size that a graph reads as a pair of its values for both of `BATCHES`, by `value_key`."""
    return {value_key(node): (values[0][node], values[1][node]) for node in graph.nodes if is_size(node)}


def value_key(node: fx.Node) -> str:
    """Return a digest of the expression that computes a value; equal expressions in both modes' graphs have one key."""
    if "regraft_key" not in node.meta:
        args = map_arg((node.args, node.kwargs), lambda source: value_key(source))
        node.meta["regraft_key"] = hashlib.sha256(repr((node.op, str(node.target), args)).encode()).hexdigest()
    return node.meta["regraft_key"]


class Interpreter(fx.Interpreter):
    """Interpreter that passes mutable copies of list and dict arguments to layers, and counts FLOPs per node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.counter = flop_counter()
        self.operations: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: D102
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.operations[n] = self.counter.get_total_flops() - before
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:  # noqa: D102
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_mutable(value) for value in args), {name: _mutable(value) for name, value in kwargs.items()}


def _mutable(value: Any) -> Any:
    """Return a plain list or dict in the place of torch.fx's immutable ones, which some forwards append to."""
    if isinstance(value, immutable_list):
        return [_mutable(item) for item in value]
    return {key: _mutable(item) for key, item in value.items()} if isinstance(value, immutable_dict) else value
