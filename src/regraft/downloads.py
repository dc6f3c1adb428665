"""Downloads of registered weights: whether they are needed, and whether the network answers.

torchvision waits for an unreachable server without a limit, and huggingface_hub asks six times with growing pauses,
which takes a minute without a network. So before a download the server is asked once, for `MAX_WAIT_S` at most, with
the library that will download, which knows its proxies and certificates. Any answer will do: it is the download that
judges it. The question runs in a thread of its own, as no timeout of Python's ends a search for a name.
"""

import contextlib
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from regraft.errors import ModelError
from regraft.wording import option

MAX_WAIT_S = 5.0  # for the first answer
ERRNO = re.compile(r"^\[Errno -?\d+\] ")
MAX_STALL_S = 30.0  # for the next bytes of a download
# What timm looks for in a repository of the hub.
HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class Download:
    """Weights that a library gets from a server.

    Attributes:
        url: Address of the file, or of its page.
        is_present: Whether an earlier download has left them on this machine.
        ask: Sends a request to the server; raises if no answer comes.
        other_way: What to do with a copy of the file from elsewhere, as text.
    """

    url: str
    is_present: bool
    ask: Callable[[], object]
    other_way: str


def from_url(url: str) -> Download:
    """Describe the download of a file by torch.hub."""
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(url).path))  # noqa: PTH119

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=MAX_WAIT_S):
            pass  # any answer will do, an error of the server too

    return Download(url, path.is_file(), ask, f"get {url} elsewhere and put it into {path.parent}")


def from_hub(repository: str, filename: str | None = None) -> Download:
    """Describe the download of a repository of the Hugging Face Hub by timm."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    repository = repository.partition("@")[0]
    url = f"{constants.ENDPOINT}/{repository}"
    names = (filename, *HUB_FILES) if filename else HUB_FILES
    is_present = any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
    other_way = f"get a file of {url} elsewhere"
    return Download(url, is_present, lambda: get_session().head(url, timeout=MAX_WAIT_S), other_way)


@contextlib.contextmanager
def answering(name: str, download: Download | None) -> Iterator[None]:
    """Ask the server first if something has to be downloaded, and let no download of torch.hub stall in the block.

    Raises:
        ModelError: The server does not answer within `MAX_WAIT_S`.
    """
    if download is None or download.is_present:
        yield
        return
    failure = _failure(download.ask)
    if failure is not None:
        raise ModelError(no_network(name, failure, download)) from failure
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MAX_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def no_network(name: str, error: Exception, download: Download | None) -> str:
    """Return the message for weights that cannot be downloaded."""
    reason = getattr(error, "reason", None) or error  # urllib's errors wrap those of the socket
    text = ERRNO.sub("", str(reason).partition("\n")[0]) or type(reason).__name__
    server = f" from {urlsplit(download.url).hostname}" if download is not None else ""
    other_way = f", or {download.other_way}" if download is not None else ""
    return (
        f"the weights of '{name}' cannot be downloaded{server} ({text}). Look at the network and its proxy "
        f"(HTTPS_PROXY). Without a network, pass a file ({option('weights', 'FILE')}), train from scratch "
        f"({option('weights', 'none')}){other_way}."
    )


def _failure(ask: Callable[[], object]) -> Exception | None:
    """Return the error of a request, a `TimeoutError` after `MAX_WAIT_S`; None if there is an answer."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:  # every library has errors of its own
            outcome.append(error)

    thread = threading.Thread(target=run, name="regraft-ask", daemon=True)
    thread.start()
    thread.join(MAX_WAIT_S)
    return outcome[0] if outcome else TimeoutError(f"no answer in {MAX_WAIT_S:g} seconds")
