"""Every error that regraft raises on purpose.

    RegraftError
    ├── InputError            what was given is wrong; nothing was changed (exit code 2)
    │   ├── ArgumentError     an argument is of a kind that a function does not take
    │   ├── ConfigError       an option, a configuration file, an output folder
    │   ├── DataError         folders, photos, tables, datasets
    │   ├── ModelError        model names, model classes
    │   │   └── ForwardError  a forward that fails
    │   ├── SelectionError    layer patterns, nothing left to train
    │   ├── EditError         an edit that does not fit the network
    │   ├── CheckpointError   files that cannot be read, weights that do not fit
    │   ├── TrustError        code would have to be imported, and nobody said that it may
    │   └── LossError         a loss that is not one finite number
    └── RunError              something outside failed: a disk, a download (exit code 1)

    Interrupted               Ctrl-C or SIGTERM, after what was reached so far was kept (exit code 130 or 143)

A message has four parts in this order: what failed (with the value), where, what was expected, what to do next.
"""

import difflib
from collections.abc import Iterable

MAX_MESSAGE = 2_000  # characters of what a file says of itself


class RegraftError(Exception):
    """The root: catch this to catch everything that regraft raises on purpose."""

    exit_code = 1


class InputError(RegraftError):
    """Something that was given is wrong, and nothing was changed."""

    exit_code = 2


class ArgumentError(InputError):
    """An argument of a public function is of a kind that the function does not take, as its annotation says."""


class ConfigError(InputError):
    """An option or a configuration file is wrong."""


class DataError(InputError):
    """A folder, a photo, a table or a dataset is wrong."""


class ModelError(InputError):
    """A model's name, its class or its forward is wrong."""


class ForwardError(ModelError):
    """A model's forward fails on what it was given.

    Attributes:
        path: Dotted path of the layer in which it failed; empty for the model's own forward, None where unknown.
        given: Shapes of the tensors that this layer was given.
        reason: What it said.
    """

    def __init__(
        self, message: str, *, path: str | None = None, given: tuple[tuple[int, ...], ...] = (), reason: str = ""
    ) -> None:
        super().__init__(message)
        self.path, self.given, self.reason = path, given, reason


class SelectionError(InputError):
    """A pattern selects nothing, or nothing is left to train."""


class EditError(InputError):
    """An edit does not fit the network."""


class CheckpointError(InputError):
    """A file cannot be read, or its weights do not fit.

    The message quotes names from that file, which may be of any length: a long one is cut in its middle.
    """

    def __init__(self, message: str) -> None:
        start, end = message[:MAX_MESSAGE], message[-MAX_MESSAGE // 2 :]
        super().__init__(message if len(message) <= 2 * MAX_MESSAGE else f"{start} … {end}")


class TrustError(InputError):
    """Code would have to be imported, and nobody said that it may."""


class LossError(InputError):
    """A loss is not one finite number."""


class RunError(RegraftError):
    """Something outside of regraft failed while it ran."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; the message says what was kept and where, and how to go on.

    Args:
        message: What it says.
        number: Of the signal, which the exit code follows.
    """

    exit_code = 130

    def __init__(self, message: str = "", *, number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def nearest(name: str, known: Iterable[str], *, prefix: str = "Nearest: ") -> str:
    """Name the known words that `name` was probably meant to be.

    Returns:
        `"Nearest: 'a', 'b'."`, or an empty string where nothing is near.

    >>> nearest("resnet8", ["resnet18", "vgg16"])
    "Nearest: 'resnet18'."
    """
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"{prefix}{', '.join(map(repr, matches))}." if matches else ""
