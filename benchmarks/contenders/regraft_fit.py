"""regraft: `fit`, with an empty cache unless `--cache` names a folder."""

import os
import tempfile
from pathlib import Path

import task

import regraft
from regraft import fit


def main() -> None:
    """Train once."""
    options = task.read_options(augment="none", views=0, cache="", lr=0.0)
    network = task.build(options)
    if options.until != "none":
        until = options.until
        regraft.freeze(network, until=until) if until else regraft.freeze(network)
        if until is None:
            regraft.unfreeze(network, "fc")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REGRAFT_CACHE"] = options.cache or folder
        watch = task.Stopwatch()
        result = fit(
            network,
            Path(options.data),
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            augment=options.augment,
            views=options.views or None,
            lr=options.lr or None,
        )
        watch.epochs = [record.seconds for record in result.history]
        accuracies = [record.validation.accuracy or 0.0 for record in result.history]
        watch.report(accuracies, phases=result.seconds)


if __name__ == "__main__":
    main()
