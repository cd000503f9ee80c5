"""How fast lens systems are drawn: ours (caustics, batched) against lenstronomy, one thread.

Both draw the same systems: a Sersic lens galaxy (n = 4) and the arcs of a Sersic source (n = 1)
behind an isothermal ellipsoid with shear, 64 pixels, sampled twofold throughout, through the same
PSF, in every band, with the noise of the survey. On a GPU, where there is one, the rate beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from lenstronomy.Data.pixel_grid import PixelGrid
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.Util import param_util

from benchmarks._harness import Row, Target, options, report
from lens_pipeline.simulation import load_config
from lens_pipeline.simulation.population import COLUMNS, candidates, magnitudes
from lens_pipeline.simulation.psf import moffat
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import SersicDiscs
from lens_pipeline.simulation.surveys import Survey

SIZE = 64
OURS, ON_GPU = "lens_pipeline, compiled", "lens_pipeline on"
FOR_A_GPU = 64  # times as many systems as for a CPU


def systems(n: int) -> pd.DataFrame:
    u = np.random.default_rng(0).random((600 * n, COLUMNS))
    return candidates(u, load_config("des")).head(n).reset_index(drop=True)


@torch.inference_mode()
def ours(
    survey: Survey, table: pd.DataFrame, device: str, batch: int, compiled: bool
) -> Callable[[], None]:
    renderer = Renderer(survey, SersicDiscs(), SIZE, device, compiled)
    random = torch.Generator(device).manual_seed(0)

    @torch.inference_mode()
    def draw() -> None:
        for start in range(0, len(table), batch):
            rows = table.iloc[start : start + batch]
            p = renderer.parameters(rows)
            galaxy, arcs = renderer.blur(renderer.elliptical(p)), renderer.blur(renderer.arcs(p))
            electrons = renderer.electrons(galaxy, magnitudes(rows, "lens", renderer.bands))
            electrons += renderer.electrons(arcs, magnitudes(rows, "source", renderer.bands))
            noise = torch.randn(electrons.shape, generator=random, device=device)
            renderer.expose(electrons, noise).cpu()

    return draw


def lenstronomy(survey: Survey, table: pd.DataFrame) -> Callable[[], None]:
    corner = -(SIZE - 1) / 2 * survey.pixel_scale
    pixels = PixelGrid(SIZE, SIZE, np.eye(2) * survey.pixel_scale, corner, corner)
    kernel = moffat(survey.best_seeing / survey.pixel_scale, survey.moffat_beta, "cpu").numpy()
    psf = PSF("PIXEL", kernel_point_source=kernel.astype(float))
    light = LightModel(["SERSIC_ELLIPSE"])
    model = ImageModel(
        pixels, psf, LensModel(["SIE", "SHEAR"]), light, light,
        kwargs_numerics={"supersampling_factor": 2},
    )  # fmt: skip
    random = np.random.default_rng(0)
    background = survey.background_variance[:, None, None]

    def draw() -> None:
        for number, p in enumerate(table.to_dict("records")):
            e1, e2 = param_util.phi_q2_ellipticity(p["position_angle"], p["axis_ratio"])
            place = {"center_x": p["x"], "center_y": p["y"], "e1": e1, "e2": e2}
            gamma1, gamma2 = param_util.shear_polar2cartesian(p["shear_angle"], p["shear"])
            shear = {"gamma1": gamma1, "gamma2": gamma2, "ra_0": p["x"], "dec_0": p["y"]}
            mass = [{"theta_E": p["einstein_radius"], **place}, shear]
            e1, e2 = param_util.phi_q2_ellipticity(p["source_angle"], p["source_axis_ratio"])
            middle = {"center_x": p["x"] + p["source_x"], "center_y": p["y"] + p["source_y"]}
            source = {"R_sersic": p["source_radius"], "n_sersic": 1.0, "e1": e1, "e2": e2, **middle}
            galaxy = {"R_sersic": p["lens_radius"], "n_sersic": 4.0, **place}
            # Their bands share the grid, too: each component is drawn once.
            arcs = model.image(mass, [source | {"amp": 1.0}], None, lens_light_add=False)
            host = model.image(mass, None, [galaxy | {"amp": 1.0}], source_add=False)
            of_source, of_lens = (
                survey.electrons(magnitudes(table.loc[[number]], name, survey.bands))[0]
                for name in ("source", "lens")
            )
            electrons = of_source[:, None, None] * arcs + of_lens[:, None, None] * host
            noise = random.standard_normal(electrons.shape) * np.sqrt(background + electrons)
            _ = (electrons + noise) / np.sqrt(background)

    return draw


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    torch.set_num_threads(1)
    table = systems(arguments.n)
    many = pd.concat([table] * FOR_A_GPU, ignore_index=True)
    rows: list[Row] = []
    targets = []
    gri = load_config("des").survey
    one = gri.model_copy(update={
        "bands": ("r",), "sky_brightness": gri.sky_brightness[1:2],
        "zero_point": gri.zero_point[1:2], "exposure_time": gri.exposure_time[1:2],
    })  # fmt: skip
    for survey, least in ((gri, 5), (one, 2)):
        draws = {
            OURS: ours(survey, table, "cpu", 32, True),
            "lens_pipeline, eager": ours(survey, table, "cpu", 32, False),
            "lenstronomy": lenstronomy(survey, table),
        }
        if torch.cuda.is_available():
            draws[f"{ON_GPU} {torch.cuda.get_device_name()}"] = ours(
                survey, many, "cuda", 2048, True
            )
        rates: dict[str, list[float]] = {name: [] for name in draws}
        for draw in draws.values():
            draw()  # plans, caches, kernels
        for _ in range(arguments.repeats):
            for name, draw in draws.items():
                begun = time.perf_counter()
                draw()
                n = len(many) if name.startswith(ON_GPU) else len(table)
                rates[name].append(n / (time.perf_counter() - begun))
        theirs = statistics.median(rates["lenstronomy"])
        bands = len(survey.bands)
        for name, values in rates.items():
            median = statistics.median(values)
            rows.append({"engine": name, "bands": bands, "systems/s": round(median, 1),
                         "of lenstronomy": median / theirs,
                         "spread": f"{min(values):.0f}-{max(values):.0f}"})  # fmt: skip
        ratio = statistics.median(rates[OURS]) / theirs
        targets.append(Target(f"rate / lenstronomy's, {bands} bands", ratio, at_least=least))
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=256)
    report(arguments, lambda: measure(arguments))
