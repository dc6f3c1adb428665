"""Labels that are probably wrong, by confident learning on scores of heads that have not learned from the photo.

A photo is a suspect if the score of another class than its own reaches what photos of that class get on average, and
its label is not the most probable class. The least probable label comes first: ranking by the probability of the label
itself was measured to beat its margin to the best other class where a network knows the classes badly.

Source: C. Northcutt, L. Jiang, I. Chuang, Confident Learning, 2021, https://arxiv.org/abs/1911.00068, section 3.1
(confident joint) and 3.2 (ranking by self-confidence).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LabelSuspect:
    """A label that is probably wrong.

    Attributes:
        index: Index of the photo.
        label: Its class.
        predicted: The class that it more probably is.
        self_confidence: Probability of its label.
        confidence: Probability of the other class.
    """

    index: int
    label: int
    predicted: int
    self_confidence: float
    confidence: float


def label_suspects(out_of_fold: torch.Tensor, targets: torch.Tensor) -> list[LabelSuspect]:
    """Return the labels that are probably wrong, the most suspicious first.

    Args:
        out_of_fold: Log-probabilities (P, K) of each photo, of a model that has not learned from it.
        targets: Labels (P,) of int64 below K.

    Returns:
        Suspects; none for a class of a single photo, and none where a score is not finite.

    >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.05, 0.95]]).log()
    >>> [suspect.index for suspect in label_suspects(scores, torch.tensor([0, 0, 1, 1, 0]))]
    [4]
    """
    scores, labels = out_of_fold.detach().double().cpu().exp(), targets.cpu().long()
    if not len(labels) or not bool(scores.isfinite().all()):
        return []
    counts = torch.bincount(labels, minlength=scores.shape[1])
    own = scores.gather(1, labels[:, None]).squeeze(1)  # self-confidence, (P,)
    sums = torch.zeros(scores.shape[1], dtype=torch.float64).index_add_(0, labels, own)
    thresholds = torch.where(counts > 1, sums / counts.clamp(min=1), torch.inf)  # mean self-confidence of each class
    confident = scores.where(scores >= thresholds, -1.0)
    best, predicted = confident.max(1)
    is_suspect = (best > 0) & (predicted != labels) & (scores.argmax(1) != labels) & (counts[labels] > 1)
    rows = is_suspect.nonzero().flatten()
    rows = rows[own[rows].argsort(stable=True)]
    return [
        LabelSuspect(row, int(labels[row]), int(predicted[row]), float(own[row]), float(best[row]))
        for row in rows.tolist()
    ]
