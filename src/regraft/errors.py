"""The exceptions of regraft.

    RegraftError
    ├── InputError            the input is wrong; nothing was changed (exit code 2)
    │   ├── ArgumentError     an argument is of a type that a function does not accept
    │   ├── ConfigError       an option, a configuration file, an output folder
    │   ├── DataError         folders, photos, tables, datasets
    │   ├── ModelError        model names, model classes
    │   │   └── ForwardError  a forward pass that fails
    │   ├── SelectionError    layer patterns, nothing left to train
    │   ├── EditError         an edit that does not fit the network
    │   ├── CheckpointError   files that cannot be read, weights that do not fit
    │   ├── TrustError        code would have to be imported without permission
    │   └── LossError         a loss that is not one finite number
    └── RunError              an external failure: a disk, a download (exit code 1)
        └── RankError         another process of the same run has ended

    Interrupted               Ctrl-C or SIGTERM, after the state so far was saved (exit code 130 or 143)

A message has four parts in this order: what failed (with the value), where, what was expected, what to do next.
"""

import difflib
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE = 2_000  # characters; messages quote names from files


class RegraftError(Exception):
    """Base class of all exceptions of regraft, except `Interrupted`.

    Attributes:
        result: Where it stopped a run, the `FitResult` of the best epoch so far; None before the first was complete.
        rank: Number of the process in which it was raised, where several train together; else None.
        is_told: Whether this process should tell it: False where another one of the same run does.
    """

    exit_code = 1
    result: Any = None
    rank: int | None = None
    is_told = True


class InputError(RegraftError):
    """The input is wrong; nothing was changed."""

    exit_code = 2


class ArgumentError(InputError):
    """An argument of a public function is of a type that its annotation does not allow."""


class ConfigError(InputError):
    """An option or a configuration file is wrong."""


class DataError(InputError):
    """A folder, a photo, a table or a dataset is wrong."""


class ModelError(InputError):
    """A model's name, its class or its forward pass is wrong."""


class ForwardError(ModelError):
    """A model's forward pass fails on its input.

    Attributes:
        path: Dotted path of the layer in which it failed; empty for the model's own forward, None if unknown.
        given: Shapes of the input tensors of this layer.
        reason: The original message.
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

    The message quotes names from that file, which may be of any length: a long message is shortened in its middle.
    """

    def __init__(self, message: str) -> None:
        start, end = message[:MAX_MESSAGE], message[-MAX_MESSAGE // 2 :]
        super().__init__(message if len(message) <= 2 * MAX_MESSAGE else f"{start} … {end}")


class TrustError(InputError):
    """Code would have to be imported, but the caller did not allow it."""


class LossError(InputError):
    """A loss is not one finite number."""


class RunError(RegraftError):
    """An external failure while regraft ran, such as a full disk."""


class RankError(RunError):
    """Another process of the same run has ended; the message names it."""

    def __init__(self, message: str, *, is_told: bool = True) -> None:
        super().__init__(message)
        self.is_told = is_told


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; the message says what was saved, where, and how to resume.

    Args:
        message: The message.
        number: Number of the signal; the exit code is 128 + number.

    Attributes:
        result: The `FitResult` of the best epoch so far; None before the first was complete.
    """

    exit_code = 130
    result: Any = None
    is_told = True

    def __init__(self, message: str = "", *, number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def nearest(name: str, known: Iterable[str], *, prefix: str = "Nearest: ") -> str:
    """Suggest the known names that are most similar to `name`.

    Returns:
        `"Nearest: 'a', 'b'."`, or an empty string if no name is similar.

    >>> nearest("resnet8", ["resnet18", "vgg16"])
    "Nearest: 'resnet18'."
    """
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"{prefix}{', '.join(map(repr, matches))}." if matches else ""
