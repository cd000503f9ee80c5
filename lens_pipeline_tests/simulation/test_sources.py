"""Real galaxies as sources: what they are, and that they are drawn as they are."""

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass, map_coordinates

from lens_pipeline.simulation.render import grid
from lens_pipeline.simulation.sources import STAMP, DeepFieldGalaxies, deep_field_galaxies


def test_galaxies_are_whole_centred_resolved_and_of_unit_flux() -> None:
    galaxies = deep_field_galaxies()
    assert len(galaxies) > 150
    assert len({(galaxy.row, galaxy.column) for galaxy in galaxies}) == len(galaxies)
    for galaxy in galaxies:
        stamp = galaxy.stamp.astype(float)
        assert stamp.sum() == pytest.approx(1, abs=1e-5)
        assert stamp.min() >= 0
        np.testing.assert_allclose(center_of_mass(stamp), (STAMP - 1) / 2, atol=0.3)
        assert 2 < galaxy.half_light_radius < 16
        border = np.concatenate([stamp[0], stamp[-1], stamp[:, 0], stamp[:, -1]])
        assert border.sum() < 0.01
    # Irregular as star-forming galaxies are: far from a point-symmetric profile.
    asymmetry = [np.abs(g.stamp - g.stamp[::-1, ::-1]).sum() / 2 for g in galaxies]
    assert np.median(asymmetry) > 0.1


def test_brightness_is_the_stamp_scaled_turned_and_of_unit_flux() -> None:
    sources = DeepFieldGalaxies("cpu")
    which, radius, angle = 40, 0.8, 0.7
    p = {
        "source_galaxy": torch.tensor([[[float(which)]]]),
        "source_radius": torch.tensor([[[radius]]]),
        "source_angle": torch.tensor([[[angle]]]),
    }
    x, y = (part[None] for part in grid(160, 0.1, 1, "cpu"))
    ours = sources.brightness(x, y, p)[0].numpy()
    assert ours.sum() * 0.1**2 == pytest.approx(1, rel=0.02)
    galaxy = deep_field_galaxies()[which]
    scale = radius / galaxy.half_light_radius
    along = (x * np.cos(angle) + y * np.sin(angle))[0].numpy() / scale
    across = (y * np.cos(angle) - x * np.sin(angle))[0].numpy() / scale
    middle = (STAMP - 1) / 2
    places = [across + middle, along + middle]
    theirs = map_coordinates(galaxy.stamp.astype(float), places, order=1) / scale**2
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * theirs.max())
    # Half of its light lies within the radius that was asked for.
    inside = np.hypot(x[0].numpy(), y[0].numpy()) < radius
    assert ours[inside].sum() / ours.sum() == pytest.approx(0.5, abs=0.06)
