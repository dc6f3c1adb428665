"""The state of a run as one tree: taken from it, held against the run that is to go on, and put back."""

import dataclasses
import hashlib
import json
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.file.tree import Tree, snapshot
from regraft.data.folders import Sample
from regraft.errors import CheckpointError, ConfigError, DataError
from regraft.frontier.cache.key import sum_of_bits
from regraft.progress import SILENT, Progress
from regraft.training.config import TrainConfig, make_config
from regraft.training.resume.progress import Standing
from regraft.training.resume.rng import random_states, set_random_states
from regraft.training.resume.run_folder import CHECKPOINT, STATES
from regraft.training.resume.state_writer import find_state
from regraft.training.setup import Job
from regraft.training.train_data import Material

FORMAT = 1
FREE = {"data", "out", "workers", "checkpoint_minutes", "keep_last", "max_unreadable"}  # change no weight


@dataclass(frozen=True)
class Origin:
    """What a state belongs to.

    Attributes:
        config: The options of the run, as they were given.
        chosen: Those that were worked out.
        is_named: Whether the options say all: a network by name, a folder, a loss by name.
        data: Digest of the list of photos, and of what else is known of the data.
        frozen: Sum of the bits of all that cannot change.
        device: Where it trains, and in which precision.
    """

    config: Tree
    chosen: Tree
    is_named: bool
    data: str
    frozen: int
    device: str

    @classmethod
    def of(cls, job: Job, config: TrainConfig, *, is_named: bool) -> "Origin":
        """Work it out for a run that is about to begin; what is compared later, only where states will be written."""
        changing = changing_tensors(job)
        rest = [tensor for name, tensor in job.model.state_dict(keep_vars=True).items() if name not in changing]
        return cls(
            config=json.loads(config.model_dump_json(exclude_unset=True)),
            chosen={"lr": job.plan.lr, "weight_decay": job.rates["weight_decay"], "head_start": job.head_start},
            is_named=is_named,
            data=_data_digest(job.material) if config.out is not None else "",
            frozen=sum_of_bits(rest) if config.out is not None else 0,
            device=job.plan.device,
        )


@dataclass(frozen=True)
class Found:
    """A state that a run left, and where it is."""

    path: Path
    tree: Tree

    @property
    def origin(self) -> Origin:
        """What it belongs to."""
        return Origin(**self.tree["origin"])

    @property
    def config(self) -> TrainConfig:
        """The options of the run, as they were given."""
        return make_config(self.origin.config, f"the options in '{self.path}'")

    def settled(self, config: TrainConfig) -> TrainConfig:
        """Return the options with those that were worked out.

        Raises:
            ConfigError: They are others than those of the run.
        """
        ours, theirs = config.model_dump(mode="json"), self.config.model_dump(mode="json")
        if other := [name for name in ours if name not in FREE and ours[name] != theirs[name]]:
            said = "; ".join(f"{name} was {theirs[name]!r}, is {ours[name]!r}" for name in other)
            raise ConfigError(
                f"the run in '{self.path.parent.parent}' has other options: {said}. Continue it with its own, or begin "
                "another one elsewhere. Nothing was changed."
            )
        return config.updated(**self.origin.chosen)


def find_run(folder: Path, progress: Progress = SILENT) -> Found | None:
    """Find the state with which the run in a folder goes on; None where there is none.

    Raises:
        ConfigError: It cannot be read, or another version wrote it.
    """
    found = find_state(folder / STATES, progress)
    if found is None:
        return None
    path, tree = found
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ConfigError(f"'{path}' was written by another version of regraft. Continue the run with that one.")
    return Found(path, tree)


def find_run_to_continue(folder: Path, progress: Progress = SILENT) -> TrainConfig:
    """Return the options of the run that stopped in a folder.

    Raises:
        ConfigError: No run stopped there, or it was begun in Python with a network, data or loss of its own.
    """
    found = find_run(folder, progress) if folder.is_dir() else None
    if found is None:
        if not folder.is_dir():
            problem = f"there is no folder '{folder}' (looked from {Path.cwd()})"
        elif (folder / CHECKPOINT).exists():
            problem = f"the run in '{folder}' has ended: its model is '{folder / CHECKPOINT}'"
        else:
            problem = f"no run has begun in '{folder}'"
        raise ConfigError(f"there is nothing to continue: {problem}. Begin one with regraft train DATA.")
    if not found.origin.is_named:
        raise ConfigError(
            f"the run in '{folder}' was begun in Python, with a network, data or a loss of its own. Continue it there: "
            f"regraft.fit(…, out={str(folder)!r}, resume=True)."
        )
    return found.config.updated(out=str(folder))


def changing_tensors(job: Job) -> dict[str, torch.Tensor]:
    """Return what training can change: all of the state but parameters that stay frozen."""
    model = job.model
    if job.unfreezing is not None:
        return model.state_dict(keep_vars=True)
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in frozen}


def take_state(job: Job, standing: Standing, origin: Origin, *, has_stale_results: bool) -> Tree:
    """Return everything that is needed to go on from here, bit for bit; later steps do not change it."""
    data = (job.material.train, job.material.validation)
    best = standing.best.to_tree() if standing.best is not None else None
    tree = snapshot(
        {
            "standing": {**standing.to_tree(), "best": None},
            "states": standing.states if standing.states is not None else random_states(*data),
            "states_now": random_states(),
            "tensors": dict(changing_tensors(job)),
            "optimizer": job.optimizer.state_dict(),
            "schedule": job.schedule.state_dict(),
            "scaler": job.scaler.state_dict(),
        }
    )
    tree["standing"]["best"] = best  # is never changed, so that nothing of it needs to be copied
    return {
        "format": FORMAT,
        "origin": dataclasses.asdict(origin),
        "has_stale_results": has_stale_results,
        **tree,
    }


def check_state(found: Found, job: Job, origin: Origin) -> None:
    """Refuse a state that does not belong to this network and this data, before anything is changed.

    Raises:
        DataError: The photos are others than those of the run.
        CheckpointError: The network, its frozen weights, or its optimizer are.
    """
    theirs = found.origin
    if theirs.data != origin.data:
        raise DataError(
            f"the data is not what the run in '{found.path.parent.parent}' has seen so far: photos were added, taken "
            "away, renamed or changed, or can no longer be read. Put them back, or begin again. Nothing was changed."
        )
    where = f"the state '{found.path}' does not fit"
    slots, tensors = changing_tensors(job), found.tree["tensors"]
    for name in [*slots, *tensors]:
        ours, saved = (tuple(part[name].shape) if name in part else None for part in (slots, tensors))
        if ours != saved:
            raise CheckpointError(
                f"{where}: '{name}' has the shape {saved} there and {ours} in {type(job.model).__name__}. Give the "
                "network that the run began with, with the same layers frozen. Nothing was changed."
            )
    if theirs.frozen != origin.frozen:
        raise CheckpointError(
            f"{where}: the frozen weights are others than those that the run began with. Give the same ones. Nothing "
            "was changed."
        )


def put_back(found: Found, job: Job) -> tuple[Standing, bool]:
    """Give network, optimizer, schedule and random generators the state that they had.

    Returns:
        Where the run stands, and whether layers have joined since it began.
    """
    tree, standing = found.tree, Standing.from_tree(found.tree["standing"])
    has_thawed = False
    if job.unfreezing is not None:  # as far as epochs have begun, so that the optimizer has the same groups
        for epoch in range(1, standing.epoch + (standing.step > 0)):
            report = job.unfreezing.advance(epoch, job.model, job.optimizer, scheduler=job.schedule, **job.rates)
            has_thawed |= report is not None
    slots = changing_tensors(job)
    with torch.no_grad():
        for name, tensor in tree["tensors"].items():
            slots[name].copy_(tensor)
    job.optimizer.load_state_dict(tree["optimizer"])
    job.schedule.load_state_dict(tree["schedule"])
    if tree["scaler"]:
        job.scaler.load_state_dict(tree["scaler"])
    set_random_states(tree["states"], job.material.train, job.material.validation)
    if standing.step > 0:
        standing.states = tree["states"]
        set_random_states({**tree["states_now"], "loaders": []})
    return standing, has_thawed


def _data_digest(material: Material) -> str:
    """Return a digest of the lists of photos, with their targets and sizes; of other data, of its lengths."""
    found = hashlib.sha256(json.dumps(material.classes).encode())
    if material.photos is not None:
        listing = material.listing
        root = listing.root if listing is not None else Path()
        for photos in material.photos:
            for sample in photos.samples:
                found.update(f"{_relative(sample, root)}\t{sample.target}\t{_size(sample)}\n".encode(errors="replace"))
        return found.hexdigest()
    for part in (material.train, material.validation):
        dataset: Any = getattr(part, "dataset", None)
        for sized in (part, dataset):
            found.update(f"{len(sized) if isinstance(sized, Sized) else None};".encode())
    return found.hexdigest()


def _relative(sample: Sample, root: Path) -> str:
    folder = root if root.is_dir() else root.parent
    return str(sample.path.relative_to(folder) if sample.path.is_relative_to(folder) else sample.path)


def _size(sample: Sample) -> int:
    try:
        return sample.path.stat().st_size
    except OSError:
        return -1
