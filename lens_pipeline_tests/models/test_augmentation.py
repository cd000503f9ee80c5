"""Augmentation: what it changes, and what it must not."""

import numpy as np
import pytest
import torch

from lens_pipeline import LitLensSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.augmentation import augment, random_dihedral, shifted


def test_turns_and_flips_change_no_pixel() -> None:
    torch.manual_seed(0)
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    turned = random_dihedral(image.expand(400, 1, 3, 3))
    assert len(torch.unique(turned.reshape(400, 9), dim=0)) == 8
    assert (turned.reshape(400, 9).sort(dim=1).values == image.reshape(1, 9)).all()


def gaussian(y0: float, x0: float, size: int = 40) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / (2 * 2.0**2))


def test_a_galaxy_is_moved_by_a_part_of_a_pixel() -> None:
    image = torch.tensor(gaussian(0, 0), dtype=torch.float32).expand(3, 2, 40, 40)
    offsets = [(0.3, -1.7), (-2.5, 0.0), (0.0, 0.0)]
    moved = shifted(image, torch.tensor(offsets), 3).numpy()
    for found, offset in zip(moved, offsets, strict=True):
        np.testing.assert_allclose(found[0], gaussian(*offset), atol=1e-5)
        np.testing.assert_array_equal(found[0], found[1])


def test_whole_pixels_are_moved_as_they_are_and_the_edge_is_mirrored() -> None:
    image = torch.randn(1, 1, 33, 32)
    moved = shifted(image, torch.tensor([[3.0, -2.0]]), 3)[0, 0]
    torch.testing.assert_close(moved[3:, :-2], image[0, 0, :-3, 2:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[:3, :-2], image[0, 0, [3, 2, 1], 2:], atol=1e-5, rtol=1e-5)


def test_noise_stays_white_under_a_shift() -> None:
    """Else a network could tell images that were moved, or learn from smoother ones."""
    torch.manual_seed(0)
    moved = shifted(torch.randn(400, 1, 32, 32), torch.rand(400, 2), 1)
    assert float(moved.std()) == pytest.approx(1, abs=0.005)
    beside = (moved[..., 1:] * moved[..., :-1]).mean()
    assert float(beside) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("brightness", [500, 5000])
def test_what_is_sharper_than_a_galaxy_does_not_ring(brightness: float) -> None:
    """Along the row of a cosmic ray, and beside a bad column, there is the noise alone."""
    torch.manual_seed(0)
    images = torch.randn(200, 1, 64, 64)
    images[:100, 0, 30, 20] += brightness
    images[100:, 0, :, 20] += brightness
    moved = shifted(images, torch.full((200, 2), 0.5), 1)
    assert moved[:100, 0, 30, 26:].std() < 1.3  # 7.5 and 75 without the asinh
    assert moved[100:, 0, 8:56, 26:].std() < 1.6  # 12 and 117
    assert moved[:100, 0, 30, 20].mean() > 10


def test_more_noise_keeps_the_unit() -> None:
    torch.manual_seed(0)
    images = torch.full((500, 1, 16, 16), 10.0) + torch.randn(500, 1, 16, 16)
    noisier = augment(images, shift=0, noise=1.0)
    level, sigma = noisier.mean(dim=(1, 2, 3)), noisier.std(dim=(1, 2, 3))
    assert float(sigma.mean()) == pytest.approx(1, abs=0.01)
    assert 10 / 2**0.5 - 0.3 < float(level.min()) < 7.5  # as of half the exposure time
    assert float(level.max()) > 9.7


def test_noise_is_for_flux_alone() -> None:
    with pytest.raises(InputError, match="noise 0.1: goes with flux"):
        LitLensSystem("lastro", units="composite", image_size=32, noise=0.1)


def test_what_scoring_keeps_of_turns_goes_with_gradients() -> None:
    system = LitLensSystem("lastro", image_size=17, test_time_augmentation=True).eval()
    system.scored(torch.zeros(1, 3, 17, 17).numpy())
    image = torch.randn(1, 3, 17, 17, requires_grad=True)
    system(image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
