"""The state of a run as one tree: taken from a run, checked against the resumed run, and restored.

A state holds only what training can change. Frozen weights come from the model again; a fingerprint of them, of the
options and of the data tells whether the state belongs to the resumed run.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.file.format import RUN_CHECKPOINT, RUN_STATES
from regraft.checkpoint.file.tree import Tree, snapshot
from regraft.data.items import length_of
from regraft.data.sources import relative_name, size_of
from regraft.errors import CheckpointError, ConfigError, DataError
from regraft.frontier.cache.key import sum_of_bits
from regraft.progress import SILENT, Progress
from regraft.training.config import TrainConfig, make_config
from regraft.training.resume.rng import random_states, set_random_states
from regraft.training.resume.run_state import RunState
from regraft.training.resume.state_writer import find_state
from regraft.training.setup import TrainSetup
from regraft.training.train_data import TrainData
from regraft.wording import for_caller

FORMAT = 1
FREE_OPTIONS = {"data", "out", "workers", "checkpoint_minutes", "keep_last", "max_unreadable"}  # change no weight


@dataclass(frozen=True)
class RunFingerprint:
    """Identifies the run that a state belongs to.

    Attributes:
        config: The options of the run, as the user passed them.
        chosen: Options that were resolved from defaults or by a sweep.
        is_named: Whether the options describe the run completely: network and loss by name, data as a path.
        data: Digest of the list of photos, or of the lengths of other data.
        frozen: Sum of the bits of all tensors that training cannot change.
        device: Device and precision of the run.
    """

    config: Tree
    chosen: Tree
    is_named: bool
    data: str
    frozen: int
    device: str

    @classmethod
    def of(cls, setup: TrainSetup, config: TrainConfig, *, is_named: bool) -> "RunFingerprint":
        """Compute the fingerprint of a run; digests only where states will be written."""
        changing = changing_tensors(setup)
        rest = [tensor for name, tensor in setup.model.state_dict(keep_vars=True).items() if name not in changing]
        return cls(
            config=json.loads(config.model_dump_json(exclude_unset=True)),
            chosen={
                "lr": setup.plan.lr or None,  # a solved head has none
                "weight_decay": setup.rates["weight_decay"],
                "head": setup.head,
                "decoder": setup.facts.preprocessing.decoder,
            },
            is_named=is_named,
            data=_data_digest(setup.train_data) if config.out is not None else "",
            frozen=sum_of_bits(rest) if config.out is not None else 0,
            device=setup.plan.device,
        )


@dataclass(frozen=True)
class SavedRun:
    """A saved state and its path."""

    path: Path
    tree: Tree

    @property
    def fingerprint(self) -> RunFingerprint:
        """The fingerprint of the run that wrote it."""
        return RunFingerprint(**self.tree["origin"])

    @property
    def config(self) -> TrainConfig:
        """The options of the run, as the user passed them."""
        return make_config(self.fingerprint.config, self.path)

    def with_resolved_options(self, config: TrainConfig) -> TrainConfig:
        """Return the options completed by the values that the run resolved.

        Raises:
            ConfigError: The options differ from those of the run.
        """
        requested, saved = config.model_dump(mode="json"), self.config.model_dump(mode="json")
        if differing := [name for name in requested if name not in FREE_OPTIONS and requested[name] != saved[name]]:
            differences = "; ".join(f"{name} was {saved[name]!r}, is {requested[name]!r}" for name in differing)
            raise ConfigError(
                f"the run in '{self.path.parent.parent}' has other options: {differences}. Continue it with its own, "
                "or begin another one elsewhere. Nothing was changed."
            )
        # A state without a decoder is of a version that had Pillow alone.
        chosen: dict[str, Any] = {"decoder": "pillow", **self.fingerprint.chosen}
        if "head_start" in chosen:  # its name in 0.1
            chosen["head"] = chosen.pop("head_start")
        return config.updated(**chosen)


def find_run(folder: Path, progress: Progress = SILENT) -> SavedRun | None:
    """Return the state from which the run in a folder resumes; None where there is none.

    Raises:
        ConfigError: It cannot be read, or another version wrote it.
    """
    newest = find_state(folder / RUN_STATES, progress)
    if newest is None:
        return None
    path, tree = newest
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ConfigError(f"'{path}' was written by another version of regraft. Continue the run with that one.")
    return SavedRun(path, tree)


def find_run_to_continue(folder: Path, progress: Progress = SILENT) -> TrainConfig:
    """Return the options of the run that stopped in a folder.

    Raises:
        ConfigError: No run stopped there, or it was started in Python with custom network, data or loss.
    """
    saved_run = find_run(folder, progress) if folder.is_dir() else None
    if saved_run is None:
        if not folder.is_dir():
            problem = f"there is no folder '{folder}' (looked from {Path.cwd()})"
        elif (folder / RUN_CHECKPOINT).exists():
            problem = f"the run in '{folder}' has ended: its model is '{folder / RUN_CHECKPOINT}'"
        else:
            problem = f"no run has begun in '{folder}'"
        start = for_caller(python="regraft.fit", command="regraft train DATA")
        raise ConfigError(f"there is nothing to continue: {problem}. Begin one with {start}.")
    if not saved_run.fingerprint.is_named:
        raise ConfigError(
            f"the run in '{folder}' was begun in Python, with a network, data or a loss of its own. Continue it there: "
            f"regraft.fit(…, out={str(folder)!r}, resume=True)."
        )
    return saved_run.config.updated(out=str(folder))


def changing_tensors(setup: TrainSetup) -> dict[str, torch.Tensor]:
    """Return the tensors that training can change: the state dict without parameters that stay frozen."""
    model = setup.model
    if setup.unfreezing is not None:  # which parameters stay frozen depends on the epoch, so all are saved
        return model.state_dict(keep_vars=True)
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in frozen}


def take_state(setup: TrainSetup, run_state: RunState, fingerprint: RunFingerprint, *, has_stale_results: bool) -> Tree:
    """Return everything needed to resume bit for bit; a snapshot that later steps do not change."""
    data = (setup.train_data.train, setup.train_data.validation)
    best = run_state.best.to_tree() if run_state.best is not None else None
    tree = snapshot(
        {
            "standing": {**run_state.to_tree(), "best": None},
            # Two random states: that at the beginning of the epoch, from which the order of its batches follows, and
            # the current one, from which dropout, for example, continues.
            "states": run_state.states if run_state.states is not None else random_states(*data),
            "states_now": random_states(),
            "tensors": dict(changing_tensors(setup)),
            "optimizer": setup.optimizer.state_dict(),
            "schedule": setup.schedule.state_dict(),
            "scaler": setup.scaler.state_dict(),
        }
    )
    tree["standing"]["best"] = best  # never changed in place, so no copy is needed
    return {
        "format": FORMAT,
        "origin": dataclasses.asdict(fingerprint),
        "has_stale_results": has_stale_results,
        **tree,
    }


def check_state(saved_run: SavedRun, setup: TrainSetup, fingerprint: RunFingerprint) -> None:
    """Refuse a state that does not belong to this network and this data, before anything is changed.

    Raises:
        DataError: The photos differ from those of the run.
        CheckpointError: The network or its frozen weights differ.
    """
    saved = saved_run.fingerprint
    if saved.data != fingerprint.data:
        raise DataError(
            f"the data is not what the run in '{saved_run.path.parent.parent}' has seen so far: photos were added, "
            "taken away, renamed or changed, or can no longer be read. Put them back, or begin again. "
            "Nothing was changed."
        )
    where = f"the state '{saved_run.path}' does not fit"
    slots, tensors = changing_tensors(setup), saved_run.tree["tensors"]
    for name in [*slots, *tensors]:
        shape, saved_shape = (tuple(part[name].shape) if name in part else None for part in (slots, tensors))
        if shape != saved_shape:
            raise CheckpointError(
                f"{where}: '{name}' has the shape {saved_shape} there and {shape} in {type(setup.model).__name__}. "
                "Give the network that the run began with, with the same layers frozen. Nothing was changed."
            )
    if saved.frozen != fingerprint.frozen:
        raise CheckpointError(
            f"{where}: the frozen weights are others than those that the run began with. Give the same ones. Nothing "
            "was changed."
        )


def restore_state(saved_run: SavedRun, setup: TrainSetup) -> tuple[RunState, bool]:
    """Restore network, optimizer, schedule and random generators from a saved state.

    Returns:
        The progress of the run, and whether layers have been unfrozen since it began.
    """
    tree, run_state = saved_run.tree, RunState.from_tree(saved_run.tree["standing"])
    if run_state.best is not None:  # the state holds the paths as text
        sources = {str(path): path for path in setup.train_data.paths}
        paths = tuple(sources.get(str(path), path) for path in run_state.best.paths)
        run_state.best = dataclasses.replace(run_state.best, paths=paths)
    has_thawed = False
    if setup.unfreezing is not None:  # repeat the unfreezing so far, so that the optimizer has the same param groups
        for epoch in range(1, run_state.epoch + (run_state.step > 0)):
            report = setup.unfreezing.advance(
                epoch, setup.model, setup.optimizer, scheduler=setup.schedule, **setup.rates
            )
            has_thawed |= report is not None
    slots = changing_tensors(setup)
    with torch.no_grad():
        for name, tensor in tree["tensors"].items():
            slots[name].copy_(tensor)
    setup.optimizer.load_state_dict(tree["optimizer"])
    setup.schedule.load_state_dict(tree["schedule"])
    if tree["scaler"]:
        setup.scaler.load_state_dict(tree["scaler"])
    set_random_states(tree["states"], setup.train_data.train, setup.train_data.validation)
    if run_state.step > 0:  # within an epoch: its order begins with `states`, and draws continue with `states_now`
        run_state.states = tree["states"]
        set_random_states({**tree["states_now"], "loaders": []})
    return run_state, has_thawed


def _data_digest(train_data: TrainData) -> str:
    """Return a digest of paths, targets and file sizes of the photos; of other data, of its lengths."""
    digest = hashlib.sha256(json.dumps(train_data.classes).encode())
    if train_data.photos is not None:
        listing = train_data.listing
        root = listing.root if listing is not None else Path()
        folder = root if root.is_dir() else root.parent
        for photos in train_data.photos:
            for sample in photos.samples:
                name = relative_name(sample.path, folder)
                digest.update(f"{name}\t{sample.target}\t{size_of(sample.path)}\n".encode(errors="replace"))
        return digest.hexdigest()
    for part in (train_data.train, train_data.validation):
        dataset: Any = getattr(part, "dataset", None)
        for sized in (part, dataset):
            digest.update(f"{length_of(sized)};".encode())
    return digest.hexdigest()
