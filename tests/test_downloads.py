"""Downloads end soon without a network: refused, unknown, silent; and any answer counts as one."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session

from regraft import create_model, downloads
from regraft.downloads import answering, from_hub, from_url
from regraft.errors import ModelError
from regraft.zoo import needs_download
from scene import Cli, assert_refused, nothing_written
from scene import cli as cli
from scene import photos as photos
from scene import workplace as workplace


@pytest.fixture(autouse=True)
def empty_caches(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workplace / "hub"))
    monkeypatch.setattr(downloads, "MAX_WAIT_S", 0.5)
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # both libraries keep the proxies of their first request
    close_session()
    yield
    close_session()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Listen on a port, and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """Serve nothing but errors, after a moment."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            time.sleep(0.1)
            self.send_error(405)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("model", ["resnet18", "timm/resnet18"])
def test_cli_train_says_what_to_do_without_a_network(
    model: str, cli: Cli, photos: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    with nothing_written():
        result = cli("train", photos, "--model", model)
    address = "download.pytorch.org" if model == "resnet18" else "huggingface.co"
    way = (
        "get https://download.pytorch.org/models/resnet18-"
        if model == "resnet18"
        else "get a file of https://huggingface.co/timm/resnet18"
    )
    assert_refused(
        result,
        f"the weights of '{model}' cannot be downloaded from {address} (Connection refused).",
        "(HTTPS_PROXY)",
        "train from scratch (--weights none)",
        way,
    )


# The question goes on in its thread, whose socket is then collected where a test runs.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("model", ["resnet18", "timm/resnet18"])
def test_create_model_waits_no_longer_for_a_proxy_that_never_answers(
    model: str, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent_port}")
    with pytest.raises(ModelError, match=r"\(no answer in 0\.5 seconds\)|\(timed out\).*weights='none'"):
        create_model(model)


def test_answering_takes_any_answer_for_a_network(refusing_server: str) -> None:
    with answering("net", from_url(f"{refusing_server}/weights.pth")):
        assert socket.getdefaulttimeout() == downloads.MAX_STALL_S
    assert socket.getdefaulttimeout() is None


def test_answering_asks_nobody_for_what_is_here(workplace: Path, closed_port: int) -> None:
    file = workplace / "torch/hub/checkpoints/weights.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    with answering("net", from_url(f"http://127.0.0.1:{closed_port}/weights.pth")):
        pass


def test_from_hub_finds_a_repository_in_the_cache(workplace: Path) -> None:
    assert not from_hub("timm/resnet18.a1_in1k").is_present
    snapshot = workplace / "hub/models--timm--resnet18.a1_in1k/snapshots/abc/model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.touch()
    (snapshot.parents[2] / "refs").mkdir()
    (snapshot.parents[2] / "refs/main").write_text("abc")
    assert from_hub("timm/resnet18.a1_in1k").is_present
    assert not needs_download("timm/resnet18.a1_in1k", "default")


@pytest.mark.parametrize("name", ["no-such-net", "timm/no-such-net", "timm/resnet18.no_such_tag", "py:net.py:Net"])
def test_needs_download_leaves_wrong_names_to_others(name: str) -> None:
    assert not needs_download(name, "default")
