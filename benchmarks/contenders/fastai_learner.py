"""fastai: a Learner that is frozen but for its head, and `fit_one_cycle`.

Batch norms of frozen layers are frozen, too (`train_bn=False`), which is not fastai's default, but less work.

Source: https://docs.fast.ai/learner.html
"""

import task
from fastai.vision.all import (
    CrossEntropyLossFlat,
    ImageDataLoaders,
    Learner,
    Normalize,
    RandomResizedCrop,
    accuracy,
    params,
)


def main() -> None:
    """Train once."""
    options = task.read_options()
    network = task.build(options)
    watch = task.Stopwatch()
    loaders = ImageDataLoaders.from_folder(
        options.data,
        train="train",
        valid="val",
        bs=options.batch_size,
        num_workers=options.workers,
        item_tfms=RandomResizedCrop(task.SIZE),
        batch_tfms=Normalize.from_stats(task.MEAN, task.STD),
        device="cpu",
    )
    learner = Learner(
        loaders,
        network,
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        splitter=lambda model: [[p for layer in list(model.children())[:-1] for p in params(layer)], params(model.fc)],
        train_bn=False,
    )
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(options.epochs, 1e-2)
    watch.report([float(values[-1]) for values in learner.recorder.values])


if __name__ == "__main__":
    main()
