"""The losses: their formulas, weights of the classes, smoothed labels."""

import numpy as np
import pytest
import torch

from lens_pipeline.models.system import LitLensSystem


def test_the_losses_are_those_of_their_formulas() -> None:
    """Binary cross-entropy with a weight; Lin et al. 2017, equation 5."""
    logit, label = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1.0, 1.0, 0.0])
    p = logit.squeeze(1).sigmoid().double()
    right = torch.where(label == 1, p, 1 - p)
    weight = torch.where(label == 1, 4.0, 1.0)
    system = LitLensSystem("lastro", pos_weight=4.0)
    expected = -(weight * right.log()).mean()
    assert system.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)
    focal = LitLensSystem("lastro", pos_weight=4.0, loss="focal", focal_gamma=2.0)
    alpha = torch.where(label == 1, 0.8, 0.2)
    expected = -(alpha * (1 - right) ** 2 * right.log()).mean()
    assert focal.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_of_a_lens_that_is_certain_the_focal_loss_has_a_slope(gamma: float) -> None:
    """In 32 bits the score of a logit of 20 is 1, and a power below 1 is steep at 0."""
    system = LitLensSystem("lastro", loss="focal", focal_gamma=gamma)
    logit = torch.tensor([[20.0], [100.0], [-20.0], [3.0]], requires_grad=True)
    system.loss(logit, torch.tensor([1.0, 1.0, 0.0, 1.0])).backward()
    assert logit.grad is not None
    assert logit.grad.isfinite().all()
    assert logit.grad[3] < 0


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_a_smoothed_label_is_where_the_loss_is_lowest(loss: str) -> None:
    system = LitLensSystem("lastro", loss=loss, label_smoothing=0.1).train()
    logits = torch.linspace(-8, 8, 3201)
    each = torch.stack([system.loss(one.view(1, 1), torch.ones(1)) for one in logits])
    assert logits[each.argmin()].sigmoid().item() == pytest.approx(0.95, abs=0.001)


def test_labels_are_smoothed_in_training_alone() -> None:
    logit, label = torch.tensor([[1.5], [-0.5]]), torch.tensor([1.0, 0.0])
    smooth, plain = LitLensSystem("lastro", label_smoothing=0.2), LitLensSystem("lastro")
    p = logit.squeeze(1).sigmoid()
    target = torch.tensor([0.9, 0.1])
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert smooth.loss(logit, label).item() == pytest.approx(expected.item(), rel=1e-6)
    assert smooth.eval().loss(logit, label).item() == pytest.approx(
        plain.eval().loss(logit, label).item()
    )


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_smoothed_labels_leave_the_weights_of_the_classes(loss: str) -> None:
    """Of each class for itself the same logits are best, however rare lenses are."""
    logit = torch.linspace(-6, 6, 1201)[:, None]
    for value in (0.0, 1.0):
        label = torch.full((1201,), value)
        best, losses = [], []
        for weight in (1.0, 100.0):
            system = LitLensSystem("lastro", loss=loss, label_smoothing=0.2, pos_weight=weight)
            each = [system.loss(x[None], y[None]).item() for x, y in zip(logit, label, strict=True)]
            best.append(logit[int(np.argmin(each))].item())
            own = weight if value else 1.0
            losses.append(np.array(each) / own * (1 + weight if loss == "focal" else 1))
        assert best[0] == pytest.approx(best[1], abs=0.02)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
        if loss == "bce":
            assert best[0] == pytest.approx(np.log(9) * (1 if value else -1), abs=0.02)
