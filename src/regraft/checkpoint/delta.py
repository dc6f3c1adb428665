"""Deltas: checkpoints that hold only the tensors that differ from a base, and pin that base by its digest.

A base may itself be a delta. The chain is first followed by headers alone, then read from its end to its start.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.arguments import check_arguments, check_minimum, check_target
from regraft.card import card_of
from regraft.checkpoint.file.contents import Contents, read_contents
from regraft.checkpoint.file.digest import digests_of
from regraft.checkpoint.file.format import (
    REGISTERED,
    Base,
    Header,
    current_versions,
    digest_of,
    is_index,
    is_plain_name,
    is_safetensors,
    locate,
)
from regraft.checkpoint.file.opening import OpenCheckpoint
from regraft.checkpoint.file.shards import write_checkpoint
from regraft.checkpoint.foreign.reading import only_state_dict, read_foreign, weights_file
from regraft.checkpoint.storable import require_storable, stored_state
from regraft.errors import CheckpointError, ModelError
from regraft.wording import option
from regraft.zoo import build, list_models

DEPTH_LIMIT = 16  # deltas in a chain
SHARD_BYTES = 5 * 2**30

Place = Path | str  # a file, or the name of registered weights
PathLike = str | os.PathLike[str]


class MissingBaseError(CheckpointError):
    """The base that a delta needs is missing, or has another digest.

    Attributes:
        problem: The message without its advice, as not every function has an argument for the base.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem} {advice}")
        self.problem = problem


@dataclass(frozen=True)
class Link:
    """A checkpoint in a chain, in which each is the base of the one before.

    Attributes:
        place: The file, or the name of registered weights.
        checkpoint: The open file; None for registered weights and for files that are no safetensors.
    """

    place: Place
    checkpoint: OpenCheckpoint | None = None

    @property
    def header(self) -> Header | None:
        """Its header; None for registered weights and for files that regraft did not write."""
        return self.checkpoint.header if self.checkpoint is not None else None


def merge(path: PathLike, out: PathLike, *, base: PathLike | None = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Convert a delta to a full checkpoint, and return its path. No code of the network is needed.

    Args:
        path: The delta.
        out: The file to write; its folder must exist.
        base: Location of its base: a file, a folder with it, or the name of registered weights. None looks beside the
            delta, or takes the registered weights that it names.
        shard_bytes: Above this total size, the checkpoint is written as several files with an index.

    Raises:
        CheckpointError: The file is not a delta, is damaged, or its base is missing. Nothing was written.
        RunError: The new file cannot be written.
    """
    check_arguments(merge, locals())
    check_target(merge, "out", out)
    check_minimum(merge, 1, shard_bytes=shard_bytes)
    with OpenCheckpoint(Path(path)) as checkpoint:
        header = checkpoint.header
        if header is None or header.base is None:
            raise CheckpointError(
                f"'{checkpoint.path}' is no delta: it holds all of its tensors, or was not made by regraft."
            )
        whole = resolve(checkpoint, base)
    unbased = {"base": None, "removed": (), "whole": None, "versions": current_versions()}
    full = header.model_copy(update={**unbased, "digests": dict(sorted(whole.digests.items()))})
    return write_checkpoint(Path(out), whole.tensors, full, shard_bytes)


def resolve(source: Path | OpenCheckpoint, base: PathLike | None = None) -> Contents:
    """Read a checkpoint with all of its bases, and verify every part.

    Args:
        source: A checkpoint, a delta or not; one that is open stays open.
        base: As for `merge`.

    Raises:
        CheckpointError: A file is damaged, or a base is missing or has another digest. Nothing was changed.
    """
    # The first of a chain has to be a checkpoint. Only a base may also be registered weights or a file of other tools.
    opened = nullcontext(source) if isinstance(source, OpenCheckpoint) else OpenCheckpoint(source)
    with opened as checkpoint, open_chain(checkpoint, base) as chain:
        return _read_chain(chain)


def _read_chain(chain: Sequence[Link]) -> Contents:
    # From the last base to the first delta: each changes what those before it gave.
    contents = read_base(chain[-1])
    for link in reversed(chain[:-1]):
        contents = _merge_delta(link, contents)
    return contents


@contextmanager
def open_chain(source: Path | OpenCheckpoint, base: PathLike | None = None) -> Iterator[list[Link]]:
    """Open a checkpoint and all of its bases; only their headers are read.

    Raises:
        CheckpointError: A base is missing or has another digest, or there are too many.
    """
    with ExitStack() as stack:
        place: Place = source.path if isinstance(source, OpenCheckpoint) else locate(source)
        link = Link(place, source if isinstance(source, OpenCheckpoint) else _opened(place, stack))
        links = [link]
        while link.header is not None and link.header.base is not None:
            if len(links) > DEPTH_LIMIT:
                raise CheckpointError(
                    f"'{links[0].place}' is a delta over more than {DEPTH_LIMIT} others. Make a full file of one of "
                    "them: regraft merge."
                )
            assert isinstance(link.place, Path)  # registered weights have no header, so they end a chain
            pinned = link.header.base
            place = _place_of(link.place, pinned, base)
            link = Link(place, _opened(place, stack))
            # Noticed here, a wrong base costs no reading of tensors. Bases without a header are verified when merged.
            if link.header is not None and link.header.digest() != pinned.digest:
                raise _wrong_base_error(links[-1].place, pinned, place, link.header.digest())
            if isinstance(place, Path) and any(place.resolve() == Path(known.place).resolve() for known in links):
                raise CheckpointError(
                    f"'{links[0].place}' is based on itself, by way of '{place}'. Get or make the files again."
                )
            links.append(link)
            # A file names the first base only. A folder may hold the whole chain, so it goes on to the next link.
            base = base if base is not None and Path(base).is_dir() else None
        yield links


def _opened(place: Place, stack: ExitStack) -> OpenCheckpoint | None:
    """Open a checkpoint; None for registered weights and for files of other tools."""
    if isinstance(place, str):
        return None
    # A path that is no file also goes to `OpenCheckpoint`, whose error says what is missing.
    is_ours = is_index(place) or not place.is_file() or is_safetensors(place)
    return stack.enter_context(OpenCheckpoint(place)) if is_ours else None


def merge_advice(delta: Path) -> str:
    """Return the advice for a missing base, for functions that have no argument for it."""
    return f"or make a full file once: `regraft merge {delta.name} --out FULL.safetensors --base FILE`."


def choose_base(base: PathLike) -> Place:
    """Return the place that an argument `base` means: a file, or the name of registered weights.

    Raises:
        CheckpointError: It is neither.
    """
    text = os.fspath(base)
    # An existing file wins over a registered name: `resnet18` may be a file in the current folder.
    if isinstance(base, str) and not Path(base).is_file():
        name = base if "@" in base else f"{base}@default"
        if REGISTERED.fullmatch(name) and name.partition("@")[0] in list_models():
            return name
    path = locate(Path(text))
    if not path.is_file():
        raise CheckpointError(
            f"no base '{text}': it is neither a file (looked from {Path.cwd()}) nor registered weights as in "
            "resnet18@IMAGENET1K_V1."
        )
    return path


def read_base(link: Link) -> Contents:
    """Read all tensors of a base: registered weights, or any file that `load_weights` reads.

    Raises:
        CheckpointError: It cannot be read, or the weights cannot be downloaded.
    """
    if isinstance(link.place, Path):
        if link.checkpoint is not None:
            return read_contents(link.checkpoint)
        foreign = only_state_dict(read_foreign(weights_file(link.place))).tensors
        tensors = {name: tensor.contiguous() for name, tensor in foreign.items()}
        return Contents(tensors, digests_of(tensors))
    tensors, shared = untied_state_dict(_build_registered(link.place))
    return Contents(tensors, digests_of(tensors), shared)


def pin_base(place: Place) -> tuple[Base, Contents]:
    """Read a base with all of its own bases, and return it with the `Base` that a delta keeps in its header.

    Raises:
        CheckpointError: It cannot be read, or its chain is already too long.
    """
    if isinstance(place, Path):
        if not is_plain_name(place.name):
            raise CheckpointError(
                f"a delta cannot name its base {place.name!r}, which has signs that other systems take for a path. "
                "Rename that file. Nothing was written."
            )
        try:
            with open_chain(place) as chain:
                if len(chain) > DEPTH_LIMIT:
                    raise CheckpointError(
                        f"'{place}' is a delta over {DEPTH_LIMIT} others already, no more are read. Make a full file "
                        "of it first: regraft merge."
                    )
                contents = _read_chain(chain)
        except MissingBaseError as error:
            raise CheckpointError(f"{error.problem} {merge_advice(place)}") from error
        return Base(kind="file", name=place.name, digest=contents.digest()), contents
    model = _build_registered(place)
    recipe = card_of(model).recipe
    assert recipe is not None
    tensors, shared = untied_state_dict(model)
    contents = Contents(tensors, digests_of(tensors), shared)
    name = f"{recipe.source.name}@{recipe.source.weights}"
    return Base(kind="registered", name=name, digest=contents.digest()), contents


def untied_state_dict(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor of the state dict once, on the CPU, and alias → name for tied tensors.

    Raises:
        CheckpointError: A tensor, or the extra state of a layer, is of a kind that no safetensors file holds.
    """
    tensors, shared, first_names = {}, {}, {}
    state = stored_state(model)
    require_storable(state)
    for name, tensor in state.items():
        first = first_names.setdefault(id(tensor), name)
        if first == name:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            # safetensors refuses tensors that share memory, as views of one larger storage do.
            tensors[name] = plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain
        else:
            shared[name] = first
    return tensors, shared


def differing(tensors: Mapping[str, torch.Tensor], base: Contents) -> dict[str, torch.Tensor]:
    """Return the tensors that the base does not hold bit-identical under the same name."""
    base_tensors = base.expanded()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in base_tensors or not _is_identical(tensor, base_tensors[name])
    }


def _is_identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are bit-identical."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes: values would call NaN different from itself, and 0.0 equal to -0.0.
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _merge_delta(link: Link, base: Contents) -> Contents:
    """Overlay the tensors of a delta on those of its base, and verify both.

    Raises:
        CheckpointError: The base has another digest, or the result is not the network that was saved.
    """
    checkpoint, header = link.checkpoint, link.header
    assert checkpoint is not None
    assert header is not None
    assert header.base is not None
    if base.digest() != header.base.digest:
        raise _wrong_base_error(link.place, header.base, header.base.name, base.digest())
    delta = read_contents(checkpoint)
    # An alias of the delta may be a tensor of its own in the base: the tie is what was saved.
    replaced = {*header.removed, *header.shared}
    kept = [name for name in base.expanded() if name not in replaced and name not in delta.tensors]
    base_tensors, base_digests = base.expanded(), base.all_digests()
    digests = {**{name: base_digests[name] for name in kept}, **delta.digests}
    # The digests above were computed from the bytes as read, so this verifies base, delta and their combination.
    if digest_of(digests) != header.whole or not set(header.shared.values()) <= set(digests):
        raise CheckpointError(
            f"'{link.place}' is damaged: with its base '{header.base.name}' it does not make the network that was "
            "saved. Get or make it again."
        )
    return Contents({**{name: base_tensors[name] for name in kept}, **delta.tensors}, digests, header.shared)


def _place_of(delta: Path, base: Base, location: PathLike | None) -> Place:
    """Return the place of a delta's base: the one that the caller names, or beside the delta.

    Raises:
        MissingBaseError: There is no such file, or it is a link to another folder.
    """
    if location is not None and not Path(location).is_dir():
        return choose_base(location)
    if base.kind == "registered":
        return base.name
    folder = delta.parent if location is None else Path(location)
    place = folder / base.name
    if place.is_file():
        # The delta names this file, not the caller: it must not lead out of the folders that the caller named.
        if place.resolve().parent not in (folder.resolve(), delta.resolve().parent):
            raise MissingBaseError(
                f"'{place}', the base of '{delta}', is a link to another folder.",
                f"Say that it may be read: {option('base', 'FILE')}.",
            )
        return place
    raise MissingBaseError(
        f"'{delta}' is a delta over {base}, which is not in '{folder}'. Put it there,",
        f"or say where it is: {option('base', 'FILE')}.",
    )


def _build_registered(name: str) -> nn.Module:
    """Build a network with registered weights, from `NAME@WEIGHTS`.

    Raises:
        CheckpointError: The weights are random, or cannot be downloaded.
    """
    model, _, weights = name.partition("@")
    if weights == "none":
        raise CheckpointError(f"'{name}' is no base: its weights are drawn anew each time. Save it, and use that file.")
    try:
        with preserved_randomness():
            return build(model, weights=weights)
    except ModelError as error:
        raise CheckpointError(
            f"the base '{name}' cannot be had: {error} Or give a file of it: {option('base', 'FILE')}."
        ) from error


def _wrong_base_error(delta: Place, pinned: Base, place: Place, digest: str) -> CheckpointError:
    """Return the error for a base with another digest than the pinned one."""
    return MissingBaseError(
        f"'{delta}' is a delta over {pinned}, and '{place}' is another ({digest[:12]}…).",
        f"Give the one that it was made from: {option('base', 'FILE')}.",
    )
