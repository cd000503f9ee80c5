"""The metrics of a stage: counted and ranked exactly, whatever the precision."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from lens_pipeline import LitEnsembleSystem
from lens_pipeline.models.metrics import StageMetrics
from lens_pipeline.models.system import LitLensSystem


def test_lenses_that_no_probability_tells_apart_are_ranked_by_their_logits() -> None:
    stage = StageMetrics(ranking=True)
    logit = torch.tensor([45.0, 44.0, 43.0, 42.0, 41.0, 40.0, 39.0, 38.0], dtype=torch.float64)
    stage.update(torch.tensor(0.0), logit, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    found = stage.compute()
    assert found["auroc"] == 1
    assert found["tpr0"] == 1


def test_sums_are_exact_where_the_network_is_of_16_bits() -> None:
    """Lightning's `bf16-true` makes all tensors of a module so."""
    stage = StageMetrics(ranking=False).to(torch.bfloat16)
    for _ in range(300):
        stage.update(torch.tensor(0.3), torch.ones(64).bfloat16(), torch.ones(64).bfloat16())
    found = stage.compute()
    assert float(found["loss"]) == pytest.approx(0.3)
    assert found["accuracy"] == 1
    assert stage.counted.sums[0] == 300 * 64


def test_the_best_candidates_are_told_apart_in_16_bits_too() -> None:
    """Else lenses and non-lenses would tie where TPR at a small FPR is decided."""
    torch.manual_seed(0)
    system = LitLensSystem("lastro", image_size=32).eval()
    with torch.no_grad():
        system.head.bias.fill_(8.0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = system(torch.randn(64, 3, 32, 32))
    assert len(logits.unique()) > 20


@pytest.mark.parametrize("found", [True, False])
def test_what_is_counted_at_one_half_is_as_scikit_learn_has_it(found: bool) -> None:
    """Over batches of several sizes, in which each cutout counts once."""
    random = np.random.default_rng(0)
    stage, seen, losses = StageMetrics(ranking=False), [], []
    for n in (5, 1, 8):
        logit, label = random.normal(size=n) - (0 if found else 9), random.integers(2, size=n)
        loss = random.random()
        stage.update(torch.tensor(loss), torch.from_numpy(logit), torch.from_numpy(label).float())
        seen.append([logit, label])
        losses += [loss] * n
    logit, label = np.concatenate(seen, axis=1)
    said = {name: float(value) for name, value in stage.compute().items()}
    taken = logit > 0
    precision, recall, f1, _ = precision_recall_fscore_support(
        label, taken, average="binary", zero_division=0
    )
    expected = {"precision": precision, "recall": recall, "f1": f1}
    expected |= {"accuracy": accuracy_score(label, taken), "loss": np.mean(losses)}
    assert said == pytest.approx(expected)


def test_no_batches_have_no_scores() -> None:
    scores = LitEnsembleSystem(("lastro",), image_size=32).predict([])
    assert list(scores) == ["probability", "logit", "std", "entropy", "probability_lastro"]
    assert len(scores) == 0
