"""Joining the ranks that a launcher started, and what is checked before they exchange anything."""

import atexit
import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from regraft.arguments import usable_device
from regraft.data.samples import Listing
from regraft.data.sources import relative_name, size_of
from regraft.errors import ConfigError, DataError, ModelError, RankError, RegraftError
from regraft.progress import Progress
from regraft.training.ranks.group import SINGLE, TIMEOUT, Ranks
from regraft.training.ranks.watch import FAILED, STOPPED, Watch, connect
from regraft.wording import for_caller, option

VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SAME_ERROR_S = 2.0  # for which a rank waits whether rank 0 fails for the same reason


@contextlib.contextmanager
def joined_ranks(device: str | torch.device, progress: Progress) -> Iterator[Ranks]:
    """Join the ranks of a launcher for a run; without one, the run has one process.

    An error inside the block is noted for the other ranks. Where it is of an exchange with a rank that has ended, or of
    the launcher, which then stops the rest, a `RankError` that names that rank takes its place.

    Raises:
        ConfigError: The environment names several processes, but no launcher started them.
        ModelError: The device does not exist, or several ranks would share a GPU.
        RankError: A rank has ended.
    """
    size = _launched_size()
    if size == 1:
        yield SINGLE
        return
    chosen = _device_of_rank(device, size)
    ranks, watch = _join(chosen)
    if watch is not None:
        watch.join_again()
    if ranks.is_first:
        progress.say(f"ranks      {size} processes, rank 0 on {chosen}, connected by {dist.get_backend()}")
    try:
        yield ranks
    except BaseException as error:
        if watch is not None:
            _note(error, ranks, watch)
        raise


def _note(error: BaseException, ranks: Ranks, watch: Watch) -> None:
    """Tell the other ranks why this one ends, and let the error say which rank it is of.

    Raises:
        RankError: This rank was stopped because another one has ended.
    """
    is_signal = isinstance(error, KeyboardInterrupt)
    if is_signal or (isinstance(error, RuntimeError) and not isinstance(error, RegraftError)):
        watch.leave(STOPPED)
        ranks.raise_for_ended(error, str(error).partition(".")[2] if is_signal else "")
    if is_signal:
        setattr(error, "is_told", ranks.is_first)  # noqa: B010
        return
    if isinstance(error, RankError):
        watch.leave(STOPPED)
        return
    reason = f"{FAILED}{str(error) or type(error).__name__}"
    watch.leave(reason)
    error.add_note(f"This is rank {ranks.rank} of {ranks.size}.")
    if isinstance(error, RegraftError):
        is_same = not ranks.is_first and watch.note_of(0, SAME_ERROR_S) == reason
        error.rank, error.is_told = ranks.rank, not is_same


def _launched_size() -> int:
    """Return the number of processes that a launcher started, this one included.

    Raises:
        ConfigError: The environment does not say how they find each other.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    text = os.environ.get("WORLD_SIZE", "1")
    if text == "1":
        return 1
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing or not text.isdecimal() or not dist.is_available():
        problem = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not" if missing else "it is no number"
        start = for_caller(python="script.py", command="-m regraft train DATA")
        raise ConfigError(
            f"WORLD_SIZE is {text!r} in the environment, which means several processes, but {problem}: no launcher "
            f"started this one. Start it with `torchrun --nproc_per_node 2 {start}`, or unset WORLD_SIZE."
        )
    return int(text)


def _device_of_rank(device: str | torch.device, size: int) -> torch.device:
    """Return the device of this rank: the GPU of its number on its machine, or the CPU.

    Raises:
        ModelError: The device does not exist, or several ranks would share a GPU.
    """
    chosen = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ModelError(
            f"{size} ranks cannot train on '{chosen.type}', which has no exchange between processes. Start one process "
            f"without a launcher, or pass {option('device', 'cpu')}."
        )
    gpus = torch.cuda.device_count()
    if chosen.index is not None and count > 1:
        raise ModelError(
            f"the device {str(device)!r} is one GPU for the {count} ranks of this machine, and each needs one of its "
            f"own. Leave the number out ({option('device', 'cuda')}), or start one rank: --nproc_per_node 1."
        )
    if local >= gpus:
        raise ModelError(
            f"rank {os.environ.get('RANK', local)} has no GPU of its own: {count} ranks on a machine with {gpus} "
            f"GPU{'s' * (gpus != 1)}. Start as many ranks as there are GPUs (--nproc_per_node {gpus}), or pass "
            f"{option('device', 'cpu')}."
        )
    return chosen if chosen.index is not None else torch.device("cuda", local)


@functools.cache
def _join(device: torch.device) -> tuple[Ranks, Watch | None]:
    """Connect to the other processes, once: a second run in this process goes on with the same connections."""
    from accelerate import PartialState  # imported only where there are several processes

    is_new = not dist.is_initialized()
    options = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if not dist.is_nccl_available():  # as on Windows
            options["backend"] = "gloo"
    PartialState(cpu=device.type == "cpu", timeout=TIMEOUT, **options)
    store = connect()
    watch = Watch(store, dist.get_rank(), dist.get_world_size()) if store is not None else None
    if watch is not None:
        atexit.register(watch.finish)
    if is_new:
        atexit.register(_disconnect)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, watch), watch


def _disconnect() -> None:
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def require_same_listing(listing: Listing, ranks: Ranks) -> None:
    """Refuse ranks that see different files: each would train on photos of its own without a word.

    Raises:
        DataError: The lists differ in a path, a target or a size; the message names the first such path and the rank.
    """
    if ranks.size == 1:
        return
    root = listing.root if listing.root.is_dir() else listing.root.parent
    own = {
        relative_name(sample.path, root): (sample.target, size_of(sample.path))
        for sample in (*listing.train, *listing.validation)
    }
    digest = hashlib.sha256(repr(sorted(own.items())).encode(errors="replace")).hexdigest()
    if len(set(ranks.objects(digest))) == 1:
        return
    first = ranks.from_first(lambda: own)
    differing = min((path for path in own.keys() | first.keys() if own.get(path) != first.get(path)), default=None)
    paths = ranks.objects((differing, own.get(differing or ""), first.get(differing or "")))
    rank, (path, here, there) = next((rank, found) for rank, found in enumerate(paths) if found[0] is not None)
    difference = (
        f"rank {rank} does not have '{path}', and rank 0 has it"
        if here is None
        else f"rank {rank} has '{path}', and rank 0 does not"
        if there is None
        else f"'{path}' has the target {here[0]} and {here[1]:,} bytes on rank {rank}, and {there[0]} and {there[1]:,} "
        "on rank 0"
    )
    raise DataError(
        f"the ranks see different files in '{listing.root}': {difference}. Give every machine the same copy of the "
        "data, or a folder that all of them share."
    )
