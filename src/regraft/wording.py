"""Options in messages, as the caller writes them: flags on the command line, arguments in Python.

Messages are worded where they are raised, also those that become parts of reports. A command says once, with
`flags_in_messages`, that its caller writes flags.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_HAS_FLAGS: ContextVar[bool] = ContextVar("has_flags", default=False)


@contextlib.contextmanager
def flags_in_messages() -> Iterator[None]:
    """Name options as flags inside the block, as a command runs there."""
    token = _HAS_FLAGS.set(True)
    try:
        yield
    finally:
        _HAS_FLAGS.reset(token)


def for_caller(*, python: str, command: str) -> str:
    """Return the text for the caller: that for Python, or that for the command line.

    >>> for_caller(python="rename={…}", command="--rename OLD=NEW")
    'rename={…}'
    """
    return command if _HAS_FLAGS.get() else python


def option(name: str, value: object = "") -> str:
    """Name an option as the caller writes it, alone or with a value.

    Args:
        name: Its name in Python.
        value: True for a flag without a value; a text in capitals stands for a value of the caller's.

    >>> option("image_size"), option("device", "cpu"), option("base", "FILE"), option("trust_code", True)
    ('image_size', "device='cpu'", 'base=FILE', 'trust_code=True')
    >>> with flags_in_messages():
    ...     option("image_size"), option("device", "cpu"), option("base", "FILE"), option("trust_code", True)
    ('--image-size', '--device cpu', '--base FILE', '--trust-code')
    """
    flag = f"--{name.replace('_', '-')}"
    if value == "":
        return for_caller(python=name, command=flag)
    if value is True:
        return for_caller(python=f"{name}=True", command=flag)
    is_quoted = isinstance(value, str) and not value.isupper()
    return for_caller(python=f"{name}={value!r}" if is_quoted else f"{name}={value}", command=f"{flag} {value}")


def rename_option() -> str:
    """Name the option for rules that rename tensors."""
    return for_caller(python="rename={…}", command="--rename OLD=NEW")
