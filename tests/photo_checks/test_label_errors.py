import numpy as np
import pytest
import torch

from regraft.photo_checks.label_errors import label_suspects


def noisy_scores(classes: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return log-probabilities, labels of which a tenth is wrong, and which these are."""
    noise = np.random.default_rng(seed)
    true = noise.integers(0, classes, count)
    logits = noise.normal(size=(count, classes))
    logits[np.arange(count), true] += 3
    labels = true.copy()
    labels[::10] = (labels[::10] + 1) % classes
    return torch.from_numpy(logits).log_softmax(1), torch.from_numpy(labels), labels != true


@pytest.mark.parametrize("classes", [2, 7])
def test_label_suspects_begin_with_wrong_labels(classes: int) -> None:
    scores, labels, is_wrong = noisy_scores(classes, 400, classes)
    suspects = label_suspects(scores, labels)
    assert np.mean([is_wrong[suspect.index] for suspect in suspects[:20]]) >= 0.9
    assert [suspect.self_confidence for suspect in suspects] == sorted(suspect.self_confidence for suspect in suspects)
    for suspect in suspects:
        assert suspect.label == labels[suspect.index] != suspect.predicted
        assert suspect.confidence == pytest.approx(scores[suspect.index, suspect.predicted].exp().item())


@pytest.mark.parametrize("classes", [2, 7])
def test_label_suspects_are_those_of_cleanlab(classes: int) -> None:
    filters = pytest.importorskip("cleanlab.filter")
    scores, labels, _ = noisy_scores(classes, 400, classes)
    expected = filters.find_label_issues(
        labels.numpy(),
        scores.exp().numpy(),
        filter_by="confident_learning",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    assert [suspect.index for suspect in label_suspects(scores, labels)] == expected.tolist()


def test_label_suspects_are_none_without_finite_scores_or_a_second_photo() -> None:
    labels = torch.tensor([0, 1, 1, 1])
    scores = torch.tensor([[0.0, 1.0]] + [[0.1, 0.9]] * 3).log()
    assert label_suspects(scores, labels) == []  # the only photo of its class
    assert label_suspects(torch.full((4, 2), torch.nan), labels) == []
    assert label_suspects(torch.zeros(0, 2), labels[:0]) == []
