"""Every engine that decodes photos, for tests that ask nothing of one of them alone."""

import pytest
import torch

from regraft.card import Preprocessing
from regraft.data.decoding import native, nvjpeg


@pytest.fixture(params=["pillow", "native", "nvjpeg"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decode with one engine whatever preprocessing a test has; without a GPU, nvJPEG's batches on the CPU."""
    if request.param != "pillow" and native.library() is None:
        pytest.skip("neither torchcodec 0.16 nor torchvision has decoders here")
    if request.param == "nvjpeg" and not torch.cuda.is_available():
        monkeypatch.setattr(nvjpeg, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(Preprocessing, "decoder", property(lambda _: request.param), raising=False)
    return request.param
