"""Each entry of `torch_internals` against torch itself: what a new release of torch changes fails here, by its name."""

import copy
import importlib
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm import layers
from torch import fx, nn
from torch.fx.experimental import symbolic_shapes
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader

from regraft import torch_internals
from regraft.torch_internals import (
    ASSERT,
    COMPILED_CHILD,
    PYTHON2_MODULES,
    PYTHON2_NAMES,
    READ_OF_ATTENTION,
    BatchNormBase,
    ConvBase,
    ConvTransposeBase,
    DropoutBase,
    FakeTensor,
    FakeTensorMode,
    InstanceNormBase,
    NormBase,
    OpOverload,
    OpOverloadPacket,
    OrthogonalParametrization,
    SpectralNormParametrization,
    TorchDispatchMode,
    TreeSpec,
    WeightNormParametrization,
    attention_of,
    buffers_of,
    children_of,
    defer_compiler,
    drop_workers,
    forward_hooks,
    forward_pre_hooks,
    has_loading_code,
    infer_lazy_shapes,
    is_compiled,
    is_jit_tracing,
    keystr,
    mark_as_parameter,
    mark_as_stepped,
    module_of_transformers,
    non_persistent_buffers,
    operation_schema,
    parameters_of,
    remove_hooks,
    run_loading_code,
    storage_id,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
    unset_fake_temporarily,
    uses_fast_norm,
    with_replaced_tensors,
    without_children,
)

NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
INSTANCE_NORMS = {nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}
TRANSPOSED = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
DROPOUTS = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
LAYERS = {kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}


def test_torch_internals_every_entry_is_checked_here() -> None:
    entries = {name for name, value in vars(torch_internals).items() if not name.startswith("_")}
    borrowed = {"torch", "nn", "fake_tensor", "parametrizations", "Any", "cast", "Callable", "Iterator", "Mapping"}
    borrowed |= {"contextlib", "copy", "importlib", "sys"}
    assert entries - borrowed - set(globals()) == set()


def is_lazy(kind: type) -> bool:
    return kind.__name__.startswith("Lazy")


@pytest.mark.parametrize(
    ("name", "base", "kinds"),
    [
        ("BatchNormBase", BatchNormBase, NORMS),
        ("InstanceNormBase", InstanceNormBase, INSTANCE_NORMS),
        ("NormBase", NormBase, NORMS | INSTANCE_NORMS),
        ("ConvBase", ConvBase, TRANSPOSED | {nn.Conv1d, nn.Conv2d, nn.Conv3d}),
        ("ConvTransposeBase", ConvTransposeBase, TRANSPOSED),
        ("DropoutBase", DropoutBase, DROPOUTS),
    ],
)
def test_torch_internals_a_base_class_is_that_of_these_layers_of_torch(name: str, base: type, kinds: set[type]) -> None:
    assert {kind for kind in LAYERS if issubclass(kind, base) and not is_lazy(kind)} == kinds, name


@pytest.mark.parametrize(
    ("name", "register", "kind"),
    [
        ("WeightNormParametrization", parametrizations.weight_norm, WeightNormParametrization),
        ("SpectralNormParametrization", parametrizations.spectral_norm, SpectralNormParametrization),
        ("OrthogonalParametrization", parametrizations.orthogonal, OrthogonalParametrization),
    ],
)
def test_torch_internals_a_parametrization_is_of_its_class(
    name: str, register: Callable[[nn.Module], Any], kind: type
) -> None:
    layer: Any = nn.Linear(3, 3)
    register(layer)
    assert parametrize.is_parametrized(layer)
    assert [type(step) for step in layer.parametrizations.weight] == [kind], name


def test_torch_internals_trees() -> None:
    value = {"a": [1, (2, 3)], "b": 4}
    leaves, spec = tree_flatten(value)
    assert leaves == tree_leaves(value) == [1, 2, 3, 4]
    assert isinstance(spec, TreeSpec)
    assert tree_unflatten(leaves, spec) == value
    assert tree_map(str, value) == {"a": ["1", ("2", "3")], "b": "4"}
    assert tree_map_only(int, str, [1, 2.5]) == ["1", 2.5]
    assert [keystr(path) for path, _ in tree_flatten_with_path(value)[0]] == [
        "['a'][0]",
        "['a'][1][0]",
        "['a'][1][1]",
        "['b']",
    ]


def test_torch_internals_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.empty(2, 3)
        assert isinstance(fake, FakeTensor)
        with unset_fake_temporarily():
            assert type(torch.empty(2, 3)) is torch.Tensor
            own = FakeTensor(mode, torch.empty(2, 3, device="meta"), torch.device("cpu"))
        assert (own + fake).shape == (2, 3)
        assert not isinstance(own, nn.Parameter)
        mark_as_parameter(own)
        assert isinstance(own, nn.Parameter)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.schemas: list[torch.FunctionSchema] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert isinstance(func, OpOverload)
        self.schemas.append(operation_schema(func))
        return func(*args, **(kwargs or {}))


def test_torch_internals_operations_are_seen_with_their_schemas() -> None:
    tensor = torch.zeros(2)
    with Operations() as seen:
        tensor.add(1).mul_(2)
    assert [(schema.name, schema.is_mutable) for schema in seen.schemas] == [("aten::add", False), ("aten::mul_", True)]
    written = [argument.name for argument in seen.schemas[1].arguments if argument.alias_info is not None]
    assert written == ["self"]
    assert seen.schemas[1].arguments[0].alias_info.is_write
    assert isinstance(torch.ops.aten.add, OpOverloadPacket)
    assert isinstance(torch.ops.aten.add.Tensor, OpOverload)


def test_torch_internals_fx_records_this_function_for_an_assertion() -> None:
    class Checked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._assert(x.ndim == 2, "two dimensions")
            return x

    assert ASSERT in {node.target for node in fx.symbolic_trace(Checked()).graph.nodes}


def test_is_jit_tracing() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(is_jit_tracing())
            return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, in one class of warnings or another
        torch.jit.trace(Asks(), (torch.zeros(1),), check_trace=False)
    assert True in seen
    assert is_jit_tracing() is False


def test_torch_internals_names_of_python_2_are_read_as_python_does() -> None:
    assert PYTHON2_MODULES["__builtin__"] == "builtins"
    assert PYTHON2_NAMES["__builtin__", "xrange"] == ("builtins", "range")
    assert pickle.loads(b"c__builtin__\nxrange\n.") is range


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = self.again = nn.Linear(2, 2)
        self.nothing: nn.Module | None
        self.register_module("nothing", None)
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_parameter("bias", None)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)


def test_torch_internals_tables_of_a_module() -> None:
    layer = Parts()
    assert list(children_of(layer).items()) == [("shared", layer.shared), ("again", layer.shared), ("nothing", None)]
    assert list(parameters_of(layer)) == ["weight", "bias"]
    assert list(buffers_of(layer)) == ["kept", "unsaved"]
    assert non_persistent_buffers(layer) == {"unsaved"}
    for table in (children_of(layer), parameters_of(layer), buffers_of(layer)):
        table.clear()
    assert [*layer.modules()] == [layer]
    assert layer.state_dict() == {}


def test_torch_internals_shallow_copies_leave_the_layer_alone() -> None:
    layer = Parts()
    empty = with_replaced_tensors(layer, lambda tensor: torch.empty_like(tensor, device="meta"))
    assert all(tensor.is_meta for tensor in buffers_of(empty).values() if tensor is not None)
    weight, bias = parameters_of(empty).values()
    assert weight is not None
    assert weight.is_meta
    assert bias is None
    assert [*without_children(layer).children()] == []
    assert layer.shared is layer.again
    assert not any(tensor.is_meta for tensor in layer.state_dict().values())


def test_torch_internals_hooks() -> None:
    layer = nn.Linear(2, 2)
    called: list[str] = []

    def before(module: nn.Module, args: Any) -> None:
        called.append("before")

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        called.append("after")

    def backward(module: nn.Module, *gradients: Any) -> None:
        called.append("backward")

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, with_kwargs=True, always_call=True)
    layer.register_full_backward_hook(backward)
    layer.register_full_backward_pre_hook(backward)
    assert [*forward_pre_hooks(layer).values()] == [before]
    assert [*forward_hooks(layer).values()] == [after]
    layer(torch.zeros(1, 2, requires_grad=True)).sum().backward()
    assert called == ["before", "after", "backward", "backward"]
    called.clear()
    remove_hooks(layer, lambda hook: hook is not before)
    layer(torch.zeros(1, 2, requires_grad=True)).sum().backward()
    assert called == ["before"]
    remove_hooks(layer, lambda hook: True)
    fresh = vars(nn.Linear(2, 2))
    assert all(
        vars(layer)[name] == fresh[name] for name in fresh if "hook" in name and name != "_is_full_backward_hook"
    )


class Renames(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_torch_internals_loading_code() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_load_state_dict_pre_hook(lambda *args: None)
    layers = [nn.Linear(2, 2), nn.BatchNorm2d(2), hooked, Renames(2, 2)]
    assert [has_loading_code(layer) for layer in layers] == [False, False, True, True]
    tensors = {"a.old": torch.ones(2, 2), "a.bias": torch.ones(2)}
    run_loading_code(layers[-1], tensors, "a.")
    assert list(tensors) == ["a.bias", "a.weight"]
    assert (layers[-1].weight == 1).all()


def test_torch_internals_lazy_layers_get_their_shapes() -> None:
    layer = nn.LazyLinear(3)
    infer_lazy_shapes(layer, (torch.zeros(1, 5),))
    assert type(layer) is nn.Linear
    assert layer.weight.shape == (3, 5)
    other = nn.LazyLinear(3)
    infer_lazy_shapes(other, (torch.zeros(1, 4),), {})
    assert other.weight.shape == (3, 4)


def test_is_compiled() -> None:
    model = nn.Linear(2, 2)
    assert not is_compiled(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert is_compiled(compiled)
    assert children_of(compiled) == {COMPILED_CHILD: model}
    assert not is_compiled(model)
    model.compile(backend="eager")
    assert is_compiled(model)
    assert not is_compiled(copy.deepcopy(model))


def test_defer_compiler_changes_nothing_where_the_compiler_is_imported() -> None:
    compiler = importlib.import_module("torch._dynamo")
    with defer_compiler():
        assert compiler is sys.modules["torch._dynamo"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_id_is_that_of_views(device: str) -> None:
    tensor = torch.zeros(4, device=device)
    assert storage_id(tensor) == storage_id(tensor[1:].view(3, 1))
    assert storage_id(tensor) != storage_id(torch.zeros(4, device=device))
    with pytest.raises((NotImplementedError, RuntimeError)):
        storage_id(torch.eye(2).to_sparse())


def test_torch_internals_a_step_that_was_left_out_is_no_warning() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    mark_as_stepped(optimizer)
    schedule.step()


def test_drop_workers() -> None:
    loader: DataLoader[int] = DataLoader(list(range(4)), num_workers=1, persistent_workers=True, timeout=60)
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]
    alone = copy.copy(loader)
    drop_workers(alone)
    assert type(iter(alone)).__name__ == "_SingleProcessDataLoaderIter"
    assert [int(batch) for batch in alone] == [0, 1, 2, 3]
    assert loader.num_workers == 1
    drop_workers(loader)  # ends its worker


def test_torch_internals_attention_holds_what_an_encoder_layer_reads() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert all(hasattr(attention, name) for name in READ_OF_ATTENTION)


def test_module_of_transformers_names_the_module_that_exports_a_class() -> None:
    module = importlib.import_module(f"transformers.{module_of_transformers('ViTForImageClassification')}")
    assert module.ViTForImageClassification.__name__ == "ViTForImageClassification"
    assert module_of_transformers("NoSuchClass") is None


def test_attention_of_a_configuration_is_what_its_network_computes() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for name in ("eager", "sdpa"):
        model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, attn_implementation=name))
        assert attention_of(model.config) == name
    assert attention_of(object()) is None


def test_uses_fast_norm() -> None:
    norm: Any = layers.LayerNorm(4)
    for choice in (True, False):
        assert "_fast_norm" in vars(norm)
        norm._fast_norm = choice
        assert uses_fast_norm(norm) is choice


VALUES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "guarding_hint_or_throw": ((3,), (True,)),
    "has_guarding_hint": ((3,), (2.5,)),
    "is_nested_int": ((3,), (2.5,)),
    "sym_eq": (((1, 2), [1, 2]), ((1, 2), (1, 3)), ((1,), (1, 2)), (4, 4), (4, 5), (torch.Size([2]), [2])),
}


@pytest.mark.filterwarnings("ignore:guard_size_oblivious:FutureWarning")
@pytest.mark.parametrize("name", torch_internals._SHAPE_ANSWERS)
def test_defer_compiler_answers_for_plain_numbers_as_the_symbolic_shapes_do(name: str) -> None:
    if not hasattr(symbolic_shapes, name):
        pytest.skip("this torch has no such function, and asks for none")
    theirs, ours = getattr(symbolic_shapes, name), torch_internals._SHAPE_ANSWERS[name]
    several = [(True, False), (True, True), (False, False), (True,), (False,)]
    of_one = [(True,), (False,)]
    for values in VALUES.get(name, several if name.startswith("sym_") else of_one):
        assert ours(*values) == theirs(*values)
        assert type(ours(*values)) is type(theirs(*values))
