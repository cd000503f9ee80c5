"""Defects of images: as frequent on lenses as on what is none, and of a pair's cutouts apart."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from lens_pipeline.simulation import load_config, simulate
from lens_pipeline.simulation.decoy_kinds import KEEP_HOST, MIXTURE
from lens_pipeline.simulation.decoys import choose_kinds
from lens_pipeline.simulation.defects import DEFECTS, RATE, add_defects, choose_defects
from lens_pipeline.simulation.hosts import SersicHosts
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import SersicDiscs

HOSTS = range(8000)


@pytest.mark.parametrize(
    "mixture",
    [
        dict(MIXTURE),
        {kind: MIXTURE[kind] for kind in KEEP_HOST},
        {"spiral": 1.0},
        {"artefact": 3.0, "ring": 1.0},
    ],
    ids=["all", "real hosts", "no artefacts", "mostly artefacts"],
)
def test_a_defect_tells_nothing_of_the_class(mixture: dict[str, float]) -> None:
    kinds = choose_kinds(5, HOSTS, mixture)
    of_lens, of_decoy = choose_defects(5, HOSTS, kinds, mixture).T
    counts = [[(of == name).sum() for name in ("", *DEFECTS)] for of in (of_lens, of_decoy)]
    assert chi2_contingency(counts).pvalue > 0.001
    both = ((of_lens != "") & (of_decoy != "")).mean()
    apart = (of_lens != "").mean() * (of_decoy != "").mean()
    assert both == pytest.approx(apart, abs=4 * np.sqrt(apart / len(HOSTS)))
    assert (of_decoy[kinds == "artefact"] != "").all()
    others = kinds != "artefact"
    assert (of_decoy[others] != "").mean() == pytest.approx(RATE, abs=4 * np.sqrt(RATE / 2000))


def test_the_catalogue_names_the_defect_of_each_cutout() -> None:
    """The same galaxies with more defects and with fewer differ in those cutouts."""
    config = load_config("des")
    many, few = (
        simulate(
            "des", 24, 29, image_size=32, config=config.model_copy(update={"decoys": {kind: 1.0}})
        )
        for kind in ("artefact", "unlensed")
    )
    assert many.table["defect"].isin(DEFECTS).all()
    assert 15 < (few.table["defect"] == "").sum() < 24  # a few have one, as is usual
    differs = (many.images != few.images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(differs, many.table["defect"] != few.table["defect"])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_in_one_band_of_the_cutout_that_has_it(defect: str) -> None:
    survey = load_config("des").survey
    galaxies = SersicHosts(Renderer(survey, SersicDiscs(), 64, "cpu"))
    hosts = np.arange(20)
    defects = np.full((20, 2), "", dtype="U11")
    defects[::2, 0] = defects[1::2, 1] = defect
    electrons = torch.zeros(20, 2, 3, 64, 64)
    add_defects(electrons, galaxies, 3, hosts, hosts, defects)
    sigma = torch.from_numpy(np.sqrt(survey.background_variance)).float()
    bands = ((electrons.amax(dim=(3, 4)) / sigma) > 2).sum(dim=2).numpy()
    np.testing.assert_array_equal(bands, defects != "")
