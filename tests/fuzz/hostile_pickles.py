"""Pickles that a reader of weights must refuse, put together instruction by instruction.

What they name stands for code: functions and classes of `marker`, which leave a mark where they run, and harmless ones
of Python and torch that no file of weights needs. The guard is a list of what may be named, so any other name shows
whether it holds. Sizes lie just over the limits of `checkpoint/foreign/limits.py` and `pickles.py`.
"""

import itertools
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from originals import zipped

NAMES = [
    *itertools.product(("marker", "marker.deeper", "no_such_module"), ("call", "Thing", "Thing.method", "_private")),
    ("math", "sqrt"),
    ("datetime", "date"),
    ("fractions", "Fraction"),
    ("statistics", "mean"),
    ("collections", "deque"),
    ("builtins", "abs"),
    ("builtins", "bytearray"),
    ("torch", "ones"),
    ("torch", "Tensor"),
    ("torch.nn", "Linear"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "no_such_function"),
    ("torchvision.models.resnet", "resnet18"),
    ("sklearn.utils", "check_array"),
    ("numpy", "ones"),
]
ARGUMENTS: list[tuple[Any, ...]] = [(), (8,), ("text", {"key": [1.5]})]
CALLS = [(module, name, arguments) for module, name in NAMES for arguments in ARGUMENTS]


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Reduced:
    """A call: a function and its arguments; with a state, which is set afterwards."""

    function: Any
    arguments: Any
    state: Any = None


@dataclass(frozen=True)
class Stored:
    """A storage: class, key and number of elements as the pickle claims them."""

    kind: str
    key: Any
    count: Any
    extra: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Raw:
    instructions: bytes


def assembled(value: Any, *, protocol: int = 2) -> bytes:
    """Write a value as a pickle."""
    return bytes([0x80, protocol]) + _written(value) + b"."


def _written(value: Any) -> bytes:
    match value:
        case Raw(instructions):
            return instructions
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Reduced(function, arguments, state):
            built = b"" if state is None else _written(state) + b"b"
            return _written(function) + _written(arguments) + b"R" + built
        case Stored(kind, key, count, extra):
            return _written(("storage", Global("torch", kind), key, "cpu", count, *extra)) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            digits = pickle.encode_long(value)
            return b"\x8a" + bytes([len(digits)]) + digits
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return _written(Reduced(Global("_codecs", "encode"), (value.decode("latin1"), "latin1")))
        case tuple():
            return b"(" + b"".join(map(_written, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_written, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_written(part) for pair in value.items() for part in pair) + b"u"
    raise TypeError(value)


ORDERED = Reduced(Global("collections", "OrderedDict"), ())


def tensor(random: Random, *, lies: bool = True) -> Reduced:
    """Call the function that makes a tensor of a storage of 8 bytes, with honest or with lying numbers."""
    others = [3, 9, -1, 0, 2, 1.5, "2", None, 2**18 + 1]  # the last: one more than may be expanded
    pick = (
        (lambda honest: random.choice(others) if random.random() < 0.4 else honest) if lies else (lambda honest: honest)
    )
    kind = (
        random.choice(["FloatStorage", "ByteStorage", "ComplexDoubleStorage", "UntypedStorage"])
        if lies
        else "FloatStorage"
    )
    storage = Stored(kind, pick("0"), pick(2))
    size = random.choice([(pick(2),), (pick(2), pick(1)), (pick(1),) * random.randrange(66)]) if lies else (2,)
    stride = (
        tuple(random.choice([0, 1, -1, 3, pick(1)]) for _ in size)
        if lies and random.random() < 0.6
        else (1,) * len(size)
    )
    return Reduced(Global("torch._utils", "_rebuild_tensor_v2"), (storage, pick(0), size, stride, False, ORDERED))


def _calls(random: Random) -> Any:
    module, name, arguments = random.choice(CALLS)
    call = Reduced(Global(module, name), arguments)
    return random.choice([call, {"w": call}, {"state_dict": {"w": tensor(random, lies=False), "x": call}}])


def _hidden(random: Random) -> Any:
    """Put a call that is not allowed where a function that is allowed takes a value."""
    module, name, arguments = random.choice(CALLS)
    inner = Global(module, name)
    plain = tensor(random, lies=False)
    return {
        "0.bias": random.choice(
            [
                Reduced(
                    Global("torch._tensor", "_rebuild_from_type_v2"), (inner, Global("torch", "Tensor"), arguments, {})
                ),
                Reduced(
                    Global("torch._tensor", "_rebuild_from_type_v2"),
                    (Global("_codecs", "encode"), Global("torch", "Tensor"), ("a", "ascii"), {}),
                ),
                Reduced(Global("torch._utils", "_rebuild_parameter"), (Reduced(inner, arguments), True, ORDERED)),
                Reduced(
                    Global("torch._utils", "_rebuild_parameter_with_state"),
                    (plain, True, ORDERED, {"contiguous": inner}),
                ),
                Reduced(Global("collections", "OrderedDict"), (Reduced(inner, arguments),)),
                Raw(_written(inner) + _written(arguments) + b"\x81" + _written({"a": 1}) + b"b"),
                Reduced(Reduced(Global("marker", "call"), ("a", "b")), ("a",)),
            ]
        )
    }


def _states(random: Random) -> Any:
    """Set attributes that have the names of methods."""
    names = ["items", "get", "keys", "shape", "detach", "contiguous", "cpu", "values", "copy", "data", "grad"]
    state = {name: random.choice([1, "x", None, tensor(random, lies=False)]) for name in random.sample(names, 5)}
    plain = tensor(random, lies=False)
    kept = Reduced(Global("torch._utils", "_rebuild_parameter_with_state"), (plain, True, ORDERED, state))
    return random.choice(
        [
            {"0.bias": kept},
            Reduced(Global("collections", "OrderedDict"), (), state),
            Reduced(plain.function, plain.arguments, state),
        ]
    )


def _tensors(random: Random) -> Any:
    return {f"{index}.bias": tensor(random) for index in range(random.randint(1, 4))}


def _special_tensors(random: Random) -> Any:
    plain, lying = tensor(random, lies=False), tensor(random)
    layout = Reduced(
        Global("torch.serialization", "_get_layout"), (random.choice(["torch.sparse_coo", "torch.sparse_csr"]),)
    )
    count = random.choice([2, 3, -1])
    sparse = Reduced(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, (plain, lying, (count, count), True)))
    quantized = Reduced(
        Global("torch._utils", "_rebuild_qtensor"),
        (
            Stored("QUInt8Storage", "0", 8),
            0,
            (count,),
            (1,),
            (Global("torch", "per_tensor_affine"), 0.1, 0),
            False,
            ORDERED,
        ),
    )
    third = Reduced(
        Global("torch._utils", "_rebuild_tensor_v3"),
        (
            Stored("UntypedStorage", "0", 8),
            0,
            (count,),
            (1,),
            False,
            ORDERED,
            Global("torch", random.choice(["float8_e5m2", "uint16", "bits8"])),
        ),
    )
    return {"0.bias": random.choice([sparse, quantized, third, Reduced(Global("torch", "Size"), ((count,),))])}


def _large(random: Random) -> Any:
    """Go just over a limit: values in a tuple, depth, objects, characters of a name; or hold itself."""
    levels = random.choice([18, 20, 21])  # 20: the first whose values in all are more than 1,000,000
    doubled_tuples = b")" + b"q\x00h\x00\x86" * levels  # each holds the one before twice
    doubled_lists = b"]" + b"q\x00](h\x00h\x00e" * levels
    deep = {"tuples": b")" + b"\x85" * 51, "lists": b"]" * 60 + b"a" * 59}
    encoded = b"c_codecs\nencode\n" * 2 + _written("a") + (_written("ascii") + b"\x86R") * 2
    cycle = b"}q\x00(" + _written("state_dict") + b"h\x00" + _written("w") + _written(tensor(random, lies=False)) + b"u"
    many = {
        "sets": b"\x8f" * 1_000_002,
        "lists": b"]" * 1_000_002,
        "marks": b"(" * 1_000,
        "texts": _written("a") * 100_000,
    }
    choice = random.randrange(11)
    match choice:
        case 0:
            return Raw(b"}" + doubled_tuples + b"K\x01s")
        case 1:
            return {"state_dict": Raw(doubled_lists), "w": tensor(random, lies=False)}
        case 2:
            return Raw(doubled_lists)
        case 3:
            return Raw(b"}" + deep["tuples"] + b"K\x01s")
        case 4:
            return {"w": Raw(deep["lists"])}
        case 5:
            return Raw(encoded)
        case 6:
            return Raw(cycle)
        case 7:
            return Raw(random.choice(list(many.values())))
        case 8:
            return Raw(b"c__builtin__\nset\n" + _written([Raw(doubled_tuples)]) + b"\x85R")
        case 9:
            return {"x" * random.choice([1_000, 1_001]): tensor(random, lies=False)}
        case _:
            return Raw(b"\x8a\xff" + b"\x7f" * 255)


KINDS: dict[str, Callable[[Random], Any]] = {
    "calls": _calls,
    "hidden calls": _hidden,
    "states": _states,
    "lying tensors": _tensors,
    "special tensors": _special_tensors,
    "large": _large,
}


def hostile_pickle(random: Random) -> tuple[str, bytes]:
    """Return a hostile file of torch, zipped or legacy, and what kind it is."""
    kind = random.choice(list(KINDS))
    value = KINDS[kind](random)
    pickled = assembled(value, protocol=random.choice([2, 2, 2, 2, 3, 4, 0]))
    if random.random() < 0.1:
        pickled = pickled[: random.randrange(len(pickled))]
    record = struct.pack("<ff", 1.0, 2.0)
    if random.random() < 0.6:
        return kind, zipped(pickled, {"0": record[: random.choice([8, 8, 8, 4, 0])]})
    magic = assembled(0x1950A86A20F9469CFC6C) + assembled(1001) + assembled({"little_endian": True})
    pickled = pickled.replace(
        b"J\x02\x00\x00\x00tQ", b"J\x02\x00\x00\x00NtQ"
    )  # legacy storages say that they are no view
    body = [magic + pickled + assembled(["0"]) + struct.pack("<q", 2) + record, pickled, magic + pickled]
    return f"{kind}, legacy", random.choice(body)
