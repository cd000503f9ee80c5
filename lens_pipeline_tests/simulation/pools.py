"""Pools of real galaxies to paint on, small and red, whose zero point and depth are known."""

from pathlib import Path

import numpy as np
import pandas as pd
from astropy.io import fits

from lens_pipeline.simulation import SimulationConfig, load_config
from lens_pipeline.simulation.hosts import RealHosts
from lens_pipeline.simulation.pool import read_pool
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import make_sources

# With a point spread function that ends within images as small as these.
DES = load_config("des").survey.model_copy(update={"moffat_beta": 8.0})
BANDS = DES.bands
SIZE = 32
ZERO_POINT = 27.5
MIN_ARC_SNR = 10.0
# Counts of DES's own background sigma at that zero point, by way of one electron's magnitude.
ONE_ELECTRON = -2.5 * np.log10(1 / DES.electrons(np.zeros(3)))
SIGMA = np.sqrt(DES.background_variance) * 10 ** (0.4 * (ZERO_POINT - ONE_ELECTRON))


def write_image(path: Path, number: int, sigma: np.ndarray, stated: bool) -> None:
    """A red galaxy and its noise: with zero points and noise maps, or a cube of counts alone."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:36, :36] - 17.5
    light = 20 * np.exp(-np.hypot(x, y) / 2.5)
    images = {
        band: (sigma[k] * ((k + 1) * light + random.standard_normal((36, 36)))).astype(np.float32)
        for k, band in enumerate(BANDS)
    }
    if not stated:
        fits.PrimaryHDU(np.stack([images[band] for band in BANDS])).writeto(path)
        return
    hdus = [fits.PrimaryHDU()]
    for k, band in ((1, "r"), (0, "g"), (2, "i")):
        hdus.append(fits.ImageHDU(images[band], name=f"{band}_FLUX"))
        hdus[-1].header["MAGZERO"] = ZERO_POINT
        hdus.append(fits.ImageHDU(np.full((36, 36), sigma[k], np.float32), name=f"{band}_RMS"))
    fits.HDUList(hdus).writeto(path)


def write_pool(folder: Path, n: int, **columns: object) -> str:
    """A catalogue of n galaxies: even rows state their zero point, and are deeper or shallower."""
    folder.mkdir()
    for number in range(n):
        stated = number % 2 == 0
        depth = 0.8 + 0.02 * (number % 20) if stated else 1.0
        write_image(folder / f"{number}.fits", number, SIGMA * depth, stated)
    table = pd.DataFrame({"id": [f"lrg{k}" for k in range(n)]}).assign(**columns)
    table["path"] = [f"{k}.fits" for k in range(n)]
    table.to_csv(folder / "catalogue.csv", index=False)
    return str(folder / "catalogue.csv")


def config_of(hosts: str, **changes: object) -> SimulationConfig:
    """Fainter arcs than by default will do, and are found sooner."""
    cuts = {"min_arc_snr": MIN_ARC_SNR}
    return SimulationConfig.model_validate(
        {"survey": DES, "hosts": hosts, "population": cuts} | changes
    )


def galaxies_of(config: SimulationConfig, size: int = SIZE) -> RealHosts:
    renderer = Renderer(config.survey, make_sources(config.sources, "cpu"), size, "cpu")
    return RealHosts(renderer, read_pool(str(config.hosts), config, size))
