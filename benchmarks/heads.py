"""The head that regraft solves, beside scikit-learn's logistic regressions on the same features; calibration; doubt.

    python benchmarks/heads.py                      # the photos in ../shared/data, ten minutes on two cores
    python benchmarks/heads.py FOLDER FOLDER        # those in folders with train/ and val/
    python benchmarks/heads.py --synthetic cuda     # the time alone, for 6,400 × 2,048 features of 10 classes

A frozen network (MobileNetV1 × 0.25, EfficientNet-lite0, both with ImageNet weights) gives the features of each photo
and of its mirror image, from which every column learns. Measured are the validation photos, which none learns from.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from engines import SETS, SHARED, build
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from regraft.data.folders import list_data
from regraft.data.photos import loader, read_photos
from regraft.training.doubt.familiarity import MAX_PHOTOS, head_inputs, remember, resemblance
from regraft.training.heads.solved_head import solve_head
from regraft.training.metrics import calibration_error
from regraft.zoo import preprocessing_of

COLUMNS = ("LR, C=1", "standardized", "standardized, CV", "regraft")
REPEATS = 3
BOOTSTRAPS = 1_000
MIN_CALIBRATED = 100  # validation photos


@dataclass
class Measured:
    """Results on one set with one network."""

    name: str
    accuracies: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    count: int = 0
    outputs: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    factor: float = 1.0
    features: dict[str, torch.Tensor] = field(default_factory=dict)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--networks", nargs="+", default=["mobilenet", "lite0"])
    parser.add_argument("--synthetic", metavar="DEVICE")
    options = parser.parse_args()
    print(machine.describe())
    if options.synthetic:
        time_synthetic(torch.device(options.synthetic))
        return
    folders = options.folders or [SHARED / "data" / name for name in SETS]
    print(f"\naccuracy / log-loss{'':<22}" + "".join(f"{name:>19}" for name in COLUMNS) + f"{'time, of CV':>13}")
    results = []
    for network in options.networks:
        for folder in folders:
            results.append(measure(network, folder))
            show(results[-1])
    for name, index in (("mean", None), ("worst against the best column", -1)):
        if index is None:
            accuracies, losses = (
                np.mean([getattr(one, key) for one in results], 0) for key in ("accuracies", "losses")
            )
            cells = "".join(f"{a:.4f} / {loss:.3f}".rjust(19) for a, loss in zip(accuracies, losses, strict=True))
            seconds = {key: sum(one.seconds[key] for one in results) for key in ("regraft", "cv")}
            print(f"{name:<41}{cells}{seconds['regraft'] / seconds['cv']:>13.2f}")
            continue
        gaps = [(max(one.accuracies[:3]) - one.accuracies[3], one) for one in results]
        gap, one = max(gaps, key=lambda pair: pair[0])
        share = max(one.accuracies[:3])
        error = (share * (1 - share) / one.count) ** 0.5
        print(f"{name}: {one.name}, {gap:.4f} lower; one standard error there is {error:.4f}")
    show_calibration(results)
    show_rejection(options.networks, results)


def features_of(network: str, folder: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    """Return features (N, 2, D) of photos and mirror images, and classes (N,), of both parts; the number of classes."""
    listing: Any = list_data(folder)
    model: Any = build(network, len(listing.classes), 0).eval()
    head = model.fc if network == "mobilenet" else model.classifier
    preprocessing, parts = preprocessing_of(model), {}
    for part, samples in (("train", listing.train), ("val", listing.validation)):
        photos, _ = read_photos(samples, preprocessing, classes=listing.classes)
        views = []
        for change in (lambda batch: batch, lambda batch: batch.flip(3)):
            with head_inputs(head) as rows, torch.inference_mode():
                for inputs, _ in loader(photos, 32):
                    model(change(inputs))
            views.append(torch.cat(rows))
        parts[part] = torch.stack(views, 1).clone(), torch.tensor([sample.target for sample in photos.samples])
    return parts, len(listing.classes)


def measure(network: str, folder: Path) -> Measured:
    """Fit every column, in turns, and measure it."""
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)  # for both: problems this small take longer on two, and the libraries' threads collide
    threadpool_limits(1)
    parts, outputs = features_of(network, folder)
    (features, labels), (measured, targets) = parts["train"], parts["val"]
    rows, targets_of_rows = features.flatten(0, 1), labels.repeat_interleave(2)
    plain, classes = rows.numpy(), targets_of_rows.numpy()
    scaler = StandardScaler().fit(plain)
    scaled, first = scaler.transform(plain), measured[:, 0]
    scaled_first = scaler.transform(first.numpy())
    photos = np.repeat(np.arange(len(labels)), 2)
    folds = list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(scaled, classes, photos))
    result = Measured(f"{network}, {folder.name}", count=len(targets), targets=targets)
    times: dict[str, list[float]] = {"regraft": [], "cv": []}
    cross_validated: Any = None
    solved: Any = None
    for _ in range(REPEATS):
        cross_validated = timed(
            lambda: LogisticRegressionCV(
                cv=folds, max_iter=1_000, l1_ratios=(0,), scoring="neg_log_loss", use_legacy_attributes=False
            ).fit(scaled, classes),
            times["cv"],
        )
        solved = timed(lambda: solve_head(rows, targets_of_rows, outputs, views=2), times["regraft"])
    log_probabilities = [
        LogisticRegression(max_iter=2_000).fit(plain, classes).predict_log_proba(first.numpy()),
        LogisticRegression(max_iter=2_000).fit(scaled, classes).predict_log_proba(scaled_first),
        cross_validated.predict_log_proba(scaled_first),
    ]
    scores = first @ solved.weight.T + solved.bias
    for logs in [*map(torch.from_numpy, log_probabilities), scores.log_softmax(1)]:
        result.accuracies.append(float((logs.argmax(1) == targets).double().mean()))
        result.losses.append(float(F.nll_loss(logs.double().clamp(min=-50), targets)))
    result.seconds = {key: statistics.median(values) for key, values in times.items()}
    result.outputs, result.factor = scores, solved.factor or 1.0
    result.features = {"train": features[:, 0], "val": first, "all": torch.cat([features[:, 0], first])}
    return result


def timed(work: Callable[[], Any], seconds: list[float]) -> Any:
    began = time.perf_counter()
    value = work()
    seconds.append(time.perf_counter() - began)
    return value


def show(result: Measured) -> None:
    pairs = zip(result.accuracies, result.losses, strict=True)
    cells = "".join(f"{accuracy:.3f} / {loss:.3f}".rjust(19) for accuracy, loss in pairs)
    ratio = result.seconds["regraft"] / result.seconds["cv"]
    print(f"{f'{result.name} ({result.count})':<41}{cells}{ratio:>13.2f}", flush=True)


def show_calibration(results: list[Measured]) -> None:
    """Print the calibration error of the validation photos: without the factor, with it, and by chance alone."""
    print(
        f"\ncalibration error{'':<24}{'before':>9}{'after':>9}{'95 % of bootstraps':>22}"
        f"{'if perfect':>12}{'less that':>11}"
    )
    generator = torch.Generator().manual_seed(0)
    for one in results:
        if one.count < MIN_CALIBRATED or one.outputs is None or one.targets is None:
            continue
        before, after = (calibration_error(scores, one.targets) for scores in (one.outputs / one.factor, one.outputs))
        draws, perfect = [], []
        for _ in range(BOOTSTRAPS):
            rows = torch.randint(one.count, (one.count,), generator=generator)
            draws.append(calibration_error(one.outputs[rows], one.targets[rows]))
            drawn = torch.multinomial(one.outputs.softmax(1), 1, generator=generator)[:, 0]
            perfect.append(calibration_error(one.outputs, drawn))
        low, high = np.quantile(draws, (0.025, 0.975))
        chance = float(np.mean(perfect))
        print(
            f"{one.name:<41}{before:>9.3f}{after:>9.3f}{f'{low:.3f} to {high:.3f}':>22}{chance:>12.3f}"
            f"{max(0.0, after - chance):>11.3f}"
        )


def show_rejection(networks: list[str], results: list[Measured]) -> None:
    """Print how well photos of other sets are told from the validation photos: the area under the ROC curve."""
    print("\nrejection, AUROC (rows: trained on; columns: others)")
    for network in networks:
        known = [one for one in results if one.name.startswith(network) and one.count >= MIN_CALIBRATED // 2]
        for one in known:
            photos = remember(
                "", one.features["train"][:: max(1, len(one.features["train"]) // MAX_PHOTOS)], one.features["val"]
            )
            if photos is None:
                continue
            cells = []
            for other in known:
                if other is one:
                    continue
                shares = [resemblance(other.features["all"], photos), resemblance(one.features["val"], photos)]
                area = roc_auc_score([0] * len(shares[0]) + [1] * len(shares[1]), torch.cat(shares))
                cells.append(f"{other.name.split(', ')[1]} {area:.3f}")
            print(f"{one.name:<41}{'   '.join(cells)}", flush=True)


def time_synthetic(device: torch.device) -> None:
    """Print the seconds that a head for 6,400 photos takes, the median of five after one more."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(6_400) % 10
    centers = torch.randn(10, 2_048, generator=generator) * 0.1
    features = (centers[targets] + torch.randn(6_400, 2_048, generator=generator)).relu().to(device)
    seconds: list[float] = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        timed(lambda: float(solve_head(features, targets.to(device), 10).weight.sum()), seconds)  # type: ignore[union-attr]
    print(f"6,400 × 2,048, 10 classes, on {device}: {statistics.median(seconds[1:]):.2f} s")


if __name__ == "__main__":
    sys.exit(main())
