"""Monte Carlo dropout."""

import numpy as np
import pytest
import torch

from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.models.uncertainty import DRAWS, dropout_masks

IMAGES = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def system() -> LitLensSystem:
    torch.manual_seed(0)
    return LitLensSystem("resnet18", image_size=32).eval()


def test_no_buffer_moves(system: LitLensSystem) -> None:
    """Monte Carlo dropout that trains BatchNorm's statistics changes what it measures."""
    before = {name: buffer.clone() for name, buffer in system.named_buffers()}
    system.scored(IMAGES)
    assert any("running_mean" in name for name in before)
    for name, buffer in system.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_draws_are_those_of_dropout_before_the_head(system: LitLensSystem) -> None:
    logit, draws = system.scored(IMAGES)
    assert logit.shape == (6,)
    assert draws.shape == (6, DRAWS)
    with torch.inference_mode():
        features = system.features(torch.from_numpy(IMAGES))
        masks = dropout_masks(features.shape[1], 0.3)
        for number in (0, DRAWS - 1):
            expected = system.head(features * masks[number]).squeeze(1)
            np.testing.assert_allclose(draws[:, number], expected.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logit, system.head(features).squeeze(1).numpy(), atol=1e-5)


def test_masks_drop_at_the_rate_and_keep_the_mean() -> None:
    masks = dropout_masks(5000, 0.3)
    assert (masks == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert masks.mean().item() == pytest.approx(1, abs=0.02)


def test_a_score_does_not_depend_on_its_batch(system: LitLensSystem) -> None:
    together, drawn = system.scored(IMAGES)
    alone, drawn_alone = system.scored(IMAGES[3:4])
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
    np.testing.assert_allclose(drawn_alone[0], drawn[3], atol=1e-5)


def test_a_system_in_training_mode_is_refused(system: LitLensSystem) -> None:
    with pytest.raises(ValueError, match="eval"):
        LitLensSystem("lastro", image_size=32).scored(IMAGES)
