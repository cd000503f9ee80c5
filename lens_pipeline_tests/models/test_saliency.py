"""Saliency against finite differences and networks of which it is known where they look."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lens_pipeline.models.names import ARCHITECTURES
from lens_pipeline.models.saliency import smooth_grad
from lens_pipeline.models.system import LitLensSystem

SIZE = 32
IMAGES = np.random.default_rng(0).normal(0, 3, (3, 3, SIZE, SIZE)).astype(np.float32)


def system_of(arch: str, **settings: object) -> LitLensSystem:
    torch.manual_seed(0)
    return LitLensSystem(arch, image_size=SIZE, **settings).eval()  # type: ignore[arg-type]


class LooksAt(nn.Module):
    """The one feature is the flux of a square of two pixels, in one band."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.place = (slice(row, row + 2), slice(column, column + 2))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 1][:, *self.place].sum(dim=(1, 2))[:, None]


def test_it_shows_where_a_network_looks_and_nothing_else() -> None:
    system = system_of("lastro")
    system.backbone, system.head = LooksAt(5, 20), nn.Linear(1, 1)
    with torch.no_grad():
        system.head.weight.fill_(-2.0)  # what speaks against a lens counts as well
    for found in smooth_grad(system, IMAGES):
        shown = np.zeros((SIZE, SIZE), bool)
        shown[5:7, 20:22] = True
        assert (found[shown] > 0).all()
        assert (found[~shown] == 0).all()


@pytest.mark.parametrize("units", ["background_sigma", "composite"])
def test_bright_and_faint_pixels_count_by_what_the_network_is_given(units: str) -> None:
    system = system_of("lastro", units=units)
    system.backbone, system.head = LooksAt(5, 20), nn.Linear(1, 1)
    with torch.no_grad():
        system.head.weight.fill_(3.0)
    images = np.zeros_like(IMAGES)
    images[1] = 20 if units == "background_sigma" else 1
    for found in smooth_grad(system, images):
        assert found[5, 20] == pytest.approx(3.0, rel=1e-5)


def test_without_noise_it_is_the_slope_that_finite_differences_give() -> None:
    system = system_of("light_transformer", bands=1)
    images = IMAGES[:1, :1]
    found = smooth_grad(system, images, draws=1, noise=0.0)[0]
    system = system.double()
    for row, column in ((3, 4), (16, 16), (20, 9)):
        stretched = np.arcsinh(images.astype(np.float64) / 2)
        logits = []
        for step in (-1e-4, 1e-4):
            moved = stretched.copy()
            moved[0, 0, row, column] += step
            with torch.no_grad():
                logits.append(float(system(torch.from_numpy(2 * np.sinh(moved)))))
        slope = (logits[1] - logits[0]) / 2e-4
        assert found[row, column] == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    "arch", [name for name in ARCHITECTURES if name not in ("resnet34", "resnet50")]
)
def test_every_architecture_has_maps_and_stays_as_it_was(arch: str) -> None:
    if ARCHITECTURES[arch].library == "efficientnet":
        pytest.importorskip("timm")
    system = system_of(arch)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    found = smooth_grad(system, IMAGES, draws=2)
    assert found.shape == (3, SIZE, SIZE)
    assert np.isfinite(found).all()
    assert (found.reshape(3, -1).max(axis=1) > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in system.state_dict().items())
    assert all(parameter.grad is None for parameter in system.parameters())
    assert not system.training


def test_a_map_does_not_depend_on_the_cutouts_beside_it() -> None:
    system = system_of("deeplens")
    images = np.concatenate([IMAGES] * 7)
    together = smooth_grad(system, images, draws=2)
    alone = smooth_grad(system, images[20:], draws=2)
    np.testing.assert_allclose(together[20:], alone, rtol=1e-3, atol=1e-6)
    assert smooth_grad(system, images[:0]).shape == (0, SIZE, SIZE)


def test_a_system_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        smooth_grad(system_of("lastro").train(), IMAGES)


def test_it_is_of_the_cutout_as_it_lies() -> None:
    plain, augmented = (
        system_of("light_transformer", test_time_augmentation=it) for it in (False, True)
    )
    np.testing.assert_array_equal(smooth_grad(augmented, IMAGES), smooth_grad(plain, IMAGES))
