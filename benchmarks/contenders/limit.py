"""The least that has to be done: read and decode every photo, and run the network on it once."""

import task
import torch
from torchvision import datasets, transforms


def main() -> None:
    """Do it once."""
    options = task.read_options()
    network = task.build(options).eval()
    watch = task.Stopwatch()
    steps = [transforms.Resize(task.RESIZE), transforms.CenterCrop(task.SIZE), transforms.ToTensor()]
    change = transforms.Compose([*steps, transforms.Normalize(task.MEAN, task.STD)])
    photos = torch.utils.data.ConcatDataset(
        [datasets.ImageFolder(options.data / part, change) for part in ("train", "val")]
    )
    batches = list(torch.utils.data.DataLoader(photos, options.batch_size, num_workers=options.workers))
    watch.lap()
    with torch.inference_mode():
        for inputs, _ in batches:
            network(inputs)
    watch.lap()
    decoding, forward = watch.epochs
    watch.report([], phases={"decoding and transforming": decoding, "one forward pass": forward})


if __name__ == "__main__":
    main()
