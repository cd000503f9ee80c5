"""The first model's gate."""

import pytest

from lens_pipeline.evaluation.gates import first_model_gate

LIMITS = {"min_lens": 50, "min_nonlens": 50, "min_auroc_low": 0.5}


def metrics(low: float | None, n_lens: int, n_nonlens: int) -> dict[str, object]:
    return {"auroc": {"low": low}, "n_lens": n_lens, "n_nonlens": n_nonlens}


def test_enough_cutouts_and_a_bound_above_chance_pass() -> None:
    decision = first_model_gate(metrics(0.501, 50, 50), **LIMITS)
    assert decision.passed
    assert decision.reasons == ()
    assert decision.figures == {"auroc_low": 0.501, "n_lens": 50, "n_nonlens": 50}


@pytest.mark.parametrize(
    ("low", "n_lens", "n_nonlens", "reasons"),
    [
        (0.5, 50, 50, ["AUROC is 0.500"]),
        (0.9, 49, 50, ["49 lenses"]),
        (0.9, 50, 49, ["49 non-lenses"]),
        (None, 50, 50, ["no interval"]),
        (0.4, 0, 3, ["0 lenses", "3 non-lenses", "AUROC is 0.400"]),
    ],
)
def test_each_shortfall_is_named(
    low: float | None, n_lens: int, n_nonlens: int, reasons: list[str]
) -> None:
    decision = first_model_gate(metrics(low, n_lens, n_nonlens), **LIMITS)
    assert not decision.passed
    assert len(decision.reasons) == len(reasons)
    for reason, part in zip(decision.reasons, reasons, strict=True):
        assert part in reason
