"""Which engine decodes photos: chosen by what is installed and where the network runs, or named."""

import torch

from regraft.card import Preprocessing
from regraft.data.decoding import native, nvjpeg
from regraft.data.decoding.resizing import FILTERS
from regraft.errors import ConfigError
from regraft.train_options import Decoder, Engine
from regraft.wording import option

FASTEST_FIRST: tuple[Engine, ...] = ("nvjpeg", "native", "pillow")


def usable_engine(wanted: Decoder, preprocessing: Preprocessing, device: torch.device) -> Engine:
    """Return the engine that is wanted, or where it cannot work the fastest one that can; `auto` wants the fastest.

    Args:
        wanted: An engine, or `auto`.
        preprocessing: The engines but Pillow resize with two of its filters.
        device: Where the network runs.
    """
    if preprocessing.interpolation not in FILTERS:
        return "pillow"
    slower = FASTEST_FIRST[0 if wanted == "auto" else FASTEST_FIRST.index(wanted) :]
    return next(engine for engine in slower if _obstacle(engine, device) is None)


def require_engine(wanted: Decoder, device: torch.device) -> None:
    """Refuse an engine that cannot work here.

    Raises:
        ConfigError: The message says why not.
    """
    if wanted != "auto" and (reason := _obstacle(wanted, device)) is not None:
        raise ConfigError(
            f"{option('decoder', wanted)} cannot be used: {reason}. Leave the option out for the fastest that can."
        )


def describe_engine(engine: Engine) -> str:
    """Return an engine as text, for the log."""
    library = native.library()
    if engine == "native" and library is not None:
        return f"native ({library.name}), and Pillow for what it leaves"
    return "nvjpeg on the GPU, and the CPU for what it leaves" if engine == "nvjpeg" else "Pillow"


def _obstacle(engine: Engine, device: torch.device) -> str | None:
    """Return why an engine cannot work, as text; None if it can."""
    if engine == "pillow":
        return None
    if engine == "native":
        return None if native.library() is not None else "neither torchcodec 0.16 nor torchvision's decoders are there"
    if device.type != "cuda":
        return f"it decodes on a GPU of NVIDIA, and the network runs on {device}"
    return None if nvjpeg.decoder(device) is not None else "no decoder is installed that was built for this GPU"
