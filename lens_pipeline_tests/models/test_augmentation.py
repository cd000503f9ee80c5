"""Augmentation: what it changes, and what it must not."""

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


def test_whole_pixels_are_moved_as_they_are_and_the_edge_is_mirrored() -> None:
    images = torch.randn(2, 2, 33, 32)
    moved = shifted(images, torch.tensor([[3, -2], [0, 0]]))
    assert torch.equal(moved[0, :, 3:, :-2], images[0, :, :-3, 2:])
    assert torch.equal(moved[0, :, :3, :-2], images[0, :, [3, 2, 1], 2:])
    assert torch.equal(moved[0, :, 3:, -2:], images[0, :, :-3, [30, 29]])
    assert torch.equal(moved[1], images[1])


def test_all_shifts_up_to_the_largest_come_and_no_pixel_changes() -> None:
    """Else a network could tell images that were moved, by smoother noise or what rings."""
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float16)
    image[0, 0, 8, 8] = 5000  # a cosmic ray
    moved = augment(image.expand(2000, 1, 16, 16), shift=2, noise=0, turn=False)
    assert torch.equal(moved.unique(), torch.tensor([0, 5000], dtype=torch.float16))
    places = moved.flatten(1).argmax(dim=1)
    rows, columns = places // 16 - 8, places % 16 - 8
    _, counts = torch.stack([rows, columns]).unique(dim=1, return_counts=True)
    assert len(counts) == 25
    assert 40 < counts.min() <= counts.max() < 120  # 80 of each
    assert torch.equal(rows.abs().amax(), torch.tensor(2))


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
