"""Validation photos that are in training too, which make every accuracy too high; looked for at next to no cost.

The features that are computed once tell which photos may be the same, by one product of matrices; only the few pairs
that are most alike are read again and compared by their pixels.
"""

import torch

from regraft.data.checks.near_duplicates import find_near_duplicates
from regraft.data.checks.thumbnails import read_thumbnails
from regraft.data.photos import Photos
from regraft.progress import Progress
from regraft.training.features.batches import Features
from regraft.training.features.frontier import Frontier

MAX_NUMBERS = 50_000_000  # features of all rows
MAX_READ = 8  # pairs
MIN_SIMILARITY = 0.9  # cosine of centered features; real sets without copies were measured to stay below
BLOCK = 4096  # rows


def say_leaks(photos: tuple[Photos, Photos], frontier: Frontier, progress: Progress) -> None:
    """Say in one line if photos of validation are in training too."""
    train, validation = photos
    if max(frontier.train.bytes, frontier.validation.bytes) > 4 * MAX_NUMBERS:
        return
    pairs = _most_alike(frontier)
    if not pairs:
        return
    sources = [validation.samples[held].path for _, held in pairs] + [train.samples[seen].path for seen, _ in pairs]
    duplicates = find_near_duplicates(read_thumbnails(sources))
    leaks = [pair for pair in duplicates if pair.first < len(pairs) <= pair.second]
    held_out = sorted({sources[pair.first] for pair in leaks}, key=str)
    if held_out:
        count = f"{'at least ' if len(held_out) > MAX_READ // 2 else ''}{len(held_out)}"
        other = next(sources[pair.second] for pair in leaks if sources[pair.first] == held_out[0])
        progress.say(
            f"warning    {count} of the photos held back are in training too, as '{held_out[0]}' = '{other}': the "
            "accuracy is too high. `regraft check` lists all"
        )


def _most_alike(frontier: Frontier) -> list[tuple[int, int]]:
    """Return the pairs (training photo, validation photo) whose features are most alike, the most alike first."""
    train, validation = _rows(frontier.train), _rows(frontier.validation)[:: frontier.validation.views]
    mean = train.mean(0)
    train, validation = (torch.nn.functional.normalize(rows - mean, dim=1) for rows in (train, validation))
    best = [(rows @ train.T).max(1) for rows in validation.split(BLOCK)]
    values, nearest = torch.cat([block.values for block in best]), torch.cat([block.indices for block in best])
    values, held = values.topk(min(MAX_READ, len(values)))
    is_alike = values >= MIN_SIMILARITY
    seen = nearest[held] // frontier.train.views
    return list(zip(seen[is_alike].tolist(), held[is_alike].tolist(), strict=True))


def _rows(features: Features) -> torch.Tensor:
    """Return the features of all views as (N * V, D) of float32, averaged over pixels."""
    count = len(features.tensors[0])
    blocks = [features.pick(rows) for rows in torch.arange(count).split(BLOCK)]
    parts = [torch.cat([block[number] for block in blocks]).float() for number in range(len(blocks[0]))]
    return torch.cat([part.flatten(2).mean(2) if part.ndim > 3 else part.flatten(1) for part in parts], 1)
