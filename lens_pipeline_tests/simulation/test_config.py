"""Surveys, and what a user's own file changes."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy.stats import kstest, truncnorm, uniform

from lens_pipeline.errors import InputError
from lens_pipeline.simulation import SURVEYS, load_config, simulate
from lens_pipeline.simulation import config as config_module
from lens_pipeline.simulation.hosts import SersicHosts
from lens_pipeline.simulation.population import COLUMNS, candidates
from lens_pipeline.simulation.psf import moffat

# Point-source depths (AB, 5 sigma) as published: DES Y6 (Bechtol et al. 2025) from its S/N = 10
# limits, HSC-SSP Wide (Aihara et al. 2018), LSST after ten years (Ivezic et al. 2019), Euclid VIS
# (Scaramella et al. 2022), CFHTLS Wide (Hudelot et al. 2012, 50 % completeness).
DEPTH = {
    "des": (25.4, 25.1, 24.5),
    "hsc": (26.5, 26.1, 25.9),
    "lsst": (27.4, 27.5, 26.8),
    "euclid_vis": (26.2,),
    "cfhtls": (26.0, 25.6, 25.2),
}


@pytest.mark.parametrize("name", SURVEYS)
def test_depths_are_near_the_published_ones(name: str) -> None:
    survey = SURVEYS[name]
    sigma = survey.seeing / survey.pixel_scale / 2.3548
    noise = np.sqrt(survey.background_variance * 4 * np.pi * sigma**2)  # of a matched Gaussian
    one_electron = survey.electrons(np.zeros(len(survey.bands)))
    depth = -2.5 * np.log10(5 * noise / one_electron)
    # A matched filter on a perfect coadd goes deeper than apertures on a real one.
    assert (depth > np.array(DEPTH[name]) - 0.3).all()
    assert (depth < np.array(DEPTH[name]) + 1.3).all()


def write(folder: Path, text: str) -> Path:
    (folder / "simulation.yaml").write_text(text)
    return folder / "simulation.yaml"


def test_a_users_file_replaces_distributions_and_cuts(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
population:
  shear: {distribution: uniform, low: 0.02, high: 0.04}
  velocity_dispersion: {distribution: normal, mean: 260, std: 40, low: 200, high: 350}
  min_einstein_radius: 0.8
""",
    )
    table = candidates(np.random.default_rng(0).random((60_000, COLUMNS)), load_config("des", file))
    assert len(table) > 200
    assert kstest(table["shear"], uniform(0.02, 0.02).cdf).pvalue > 0.01
    assert table["velocity_dispersion"].between(200, 350).all()
    assert table["einstein_radius"].min() >= 0.8
    config = load_config("des", file)
    drawn = config.population.velocity_dispersion(np.random.default_rng(1).random(4000))  # type: ignore[misc]
    assert kstest(drawn, truncnorm(-1.5, 2.25, 260, 40).cdf).pvalue > 0.01


def test_a_users_file_chooses_decoys_sources_and_seeing(tmp_path: Path) -> None:
    file = write(tmp_path, "survey: {seeing: 1.2}\nsources: sersic\ndecoys: {ring: 1, star: 1}\n")
    config = load_config("hsc", file)
    assert (config.survey.seeing, config.survey.pixel_scale) == (1.2, 0.168)
    table = simulate("hsc", 60, config=config, image_size=40).table
    assert set(table["kind"]) == {"lens", "ring", "star"}
    assert (table["source_galaxy"] == "").all()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sources: [", "is no YAML"),
        ("hosts: https://host/c.csv?X-Amz-Signature=s3cret", "must not carry a signature"),
        ("- 1", "keys and their values"),
        ("source: hubble", "source: there is no such key; did you mean sources?"),
        ("min_arc_snr: 30", "there is no such key; did you mean population.min_arc_snr?"),
        ("survey: {seing: 1}", "survey.seing: there is no such key; did you mean survey.seeing?"),
        ("survey: {filter: r}", "survey.filter: there is no such key; there are name, "),
        ("sources: keck", "sources"),
        ("decoys: {planet: 1}", "planet is none of"),
        ("decoys: {ring: 0}", "at least one weight"),
        ("survey: {seeing: -1}", "survey.seeing"),
        ("survey: {bands: []}", "survey.bands"),
        ("survey: {bands: [g, g, r]}", "survey: bands: g, g, r: one is named twice"),
        ("survey: {seeing: .inf}", "survey.seeing"),
        ("survey: {sky_brightness: [.nan, 20, 20]}", "survey.sky_brightness"),
        ("decoys: {ring: .inf}", "decoys.ring"),
        (
            "population: {source_axis_ratio: {distribution: constant, value: 0.3}}",
            "population.source_axis_ratio: real galaxies (sources: hubble) have their own shapes",
        ),
        (
            "population: {lens_redshift: {distribution: normal, mean: 9, std: 0.1, high: 1}}",
            "low and high are too many std from the mean",
        ),
        ("survey: {bands: [g, z]}", "survey: bands: 'z' is none of g, r, i, VIS"),
        ("survey: {seeing: [1, 1.1]}", "seeing: has 2 values for the bands g, r, i; give one"),
        ("survey: {psf: [a.fits]}", "psf: has 1 values for the bands g, r, i; give one"),
        ("survey: {zero_point: [25]}", "zero_point: has 1 values for the bands g, r, i"),
        ("survey: {bands: [VIS]}", "sky_brightness: has 3 values for the bands VIS; give one"),
        ("survey: {bands: [g]}\npopulation: {shear: {distribution: flat}}", "population.shear"),
        ("population: {min_einstein_radius: 4}", "must be below max_einstein_radius, which is 3"),
        (
            "population: {shear: {distribution: uniform, low: 0.1, high: 0}}",
            "low must not be above",
        ),
        ("population: {shear: {distribution: constant, value: 1.2}}", "shear: must be at least 0"),
        (
            "population: {lens_axis_ratio: {distribution: normal, mean: 0.8, std: 0.2}}",
            "lens_axis_ratio: must be above 0, and at most 1, and 1.42 is drawn",
        ),
        (
            "population: {source_redshift: {distribution: constant, value: 0}}",
            "above 0, and at most 12, and 0 is",
        ),
        ("population: {min_magnification: [3]}", "population.min_magnification"),
        (
            "population: {source_redshift: {distribution: constant, value: 15}}",
            "at most 12, and 15 is",
        ),
        (
            "population: {source_i_magnitude: {distribution: constant, value: 17}}",
            "source_i_magnitude: must be from 18 to 32, and 17 is",
        ),
        (
            "survey: {sky_brightness: [100, 20, 20], read_noise: 0}",
            "in g an empty pixel has a noise of",
        ),
        ("hosts: ''", "names a file by an empty text"),
        ("survey: {seeing: [1.3, -1, 1]}", "survey.seeing.1: Input should be greater than 0"),
        ("survey: {psf: [g.fits, 3, i.fits]}", "survey.psf.1: Input should be a valid string"),
        ("survey: {sky_brightness: 21}", "survey.sky_brightness: must be a list"),
        (
            "population: {velocity_dispersion: 250}",
            "population.velocity_dispersion: must hold keys and their values",
        ),
        (
            "population: {velocity_dispersion: {mean: 250}}",
            "must hold keys and their values, 'distribution' among them",
        ),
        ("decoys: [ring]", "decoys: must hold keys and their values"),
    ],
)
def test_what_is_wrong_in_a_users_file_is_named(text: str, named: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError) as problem:
        load_config("des", file)
    assert str(file) in str(problem.value)
    assert named in str(problem.value)


def test_a_users_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "simulation.yaml"
    file.write_bytes("sources: sérsic".encode("latin-1"))
    with pytest.raises(InputError, match=f"{file}: is no YAML"):
        load_config("des", file)


def test_the_example_in_the_docstring_is_a_users_file(tmp_path: Path) -> None:
    example = inspect.cleandoc(str(config_module.__doc__).partition("::")[2].partition("\nWith")[0])
    found = load_config("des", write(tmp_path, example))
    assert found.decoys == {"unlensed": 2, "edge_on": 1}
    assert found.population.min_arc_snr == 30


def test_a_normal_distribution_far_above_its_mean(tmp_path: Path) -> None:
    """Where the normal integral is 1 to the last digit."""
    shear = "{distribution: normal, mean: 0, std: 0.01, low: 0.2, high: 0.3}"
    file = write(tmp_path, f"population: {{shear: {shear}}}")
    distribution = load_config("des", file).population.shear
    u = np.linspace(0, 1, 1001)[1:-1]
    expected = truncnorm.ppf(u, 20, 30, 0, 0.01)
    np.testing.assert_allclose(distribution(u), expected, rtol=1e-9)  # type: ignore[misc]


def test_the_seeing_of_a_psf_is_its_width(tmp_path: Path) -> None:
    """Not the preset's, which is another camera's; but what the file states is kept."""
    for name, fwhm in (("g", 2.4), ("r", 3.1), ("i", 5.0)):
        fits.PrimaryHDU(moffat(fwhm, 3.0, "cpu").numpy()).writeto(tmp_path / f"{name}.fits")
    of_one = load_config("des", write(tmp_path, "survey: {psf: r.fits}")).survey
    assert of_one.seeing == pytest.approx(3.1 * 0.263, rel=0.02)
    each = "psf: [g.fits, r.fits, i.fits], pixel_scale: 0.2"
    of_each = load_config("des", write(tmp_path, f"survey: {{{each}}}")).survey
    assert of_each.seeings == pytest.approx((0.48, 0.62, 1.0), rel=0.02)
    stated = load_config("des", write(tmp_path, f"survey: {{{each}, seeing: 1.5}}")).survey
    assert stated.seeing == 1.5
    with pytest.raises(InputError, match=r"survey\.psf: .*none\.fits cannot be read"):
        load_config("des", write(tmp_path, "survey: {psf: none.fits}"))


def test_sections_of_comments_alone_are_their_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "survey:\n  # seeing: 1\npopulation:\nsources: sersic\n")
    assert load_config("des", file) == load_config("des").model_copy(update={"sources": "sersic"})


def test_some_bands_of_a_survey_keep_what_it_says_of_them(tmp_path: Path) -> None:
    preset = load_config("des").survey
    survey = load_config("des", write(tmp_path, "survey: {bands: [i, g]}")).survey
    assert survey.bands == ("i", "g")
    assert survey.zero_point == (preset.zero_point[2], preset.zero_point[0])
    assert survey.sky_brightness == (preset.sky_brightness[2], preset.sky_brightness[0])
    config = load_config("des", write(tmp_path, "survey: {bands: [r]}"))
    assert simulate("des", 4, config=config, image_size=32).images.shape[1] == 1


def test_seeing_and_psf_may_be_given_for_each_band(tmp_path: Path) -> None:
    file = write(tmp_path, "survey: {seeing: [1.3, 1.1, 0.9], psf: [g.fits, /r.fits, i.fits]}\n")
    survey = load_config("des", file).survey
    assert survey.seeings == (1.3, 1.1, 0.9)
    assert survey.psfs == (f"{tmp_path}/g.fits", "/r.fits", f"{tmp_path}/i.fits")
    config = load_config("des", write(tmp_path, "survey: {seeing: [1.3, 1.1, 0.9]}\n"))
    assert simulate("des", 4, config=config, image_size=32).images.shape == (4, 3, 32, 32)


def test_each_band_of_lsst_has_its_own_visits(tmp_path: Path) -> None:
    """80, 184 and 184 of 30 s: SMTN-002."""
    survey = load_config("lsst").survey
    visits, at = np.array([80, 184, 184]), np.array([28.38 - 22.26, 28.16 - 21.2, 27.85 - 20.48])
    by_hand = visits * (30 * 10 ** (0.4 * at) * 0.2**2 + 10.0**2)
    np.testing.assert_allclose(survey.background_variance, by_hand)
    one = load_config("lsst", write(tmp_path, "survey: {bands: [g]}")).survey
    np.testing.assert_allclose(one.background_variance, by_hand[:1])


def test_a_population_without_detectable_lenses_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "population: {min_arc_snr: 1000000}")
    with pytest.raises(InputError, match="is a detectable lens; loosen its cuts"):
        simulate("des", 2, config=load_config("des", file), image_size=32)


def test_a_host_that_takes_long_ends_nothing_where_others_have_found_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many hosts some are unlucky, and the population is none that is impossible."""
    monkeypatch.setattr(SersicHosts, "blocks", 20)
    config = load_config("des", write(tmp_path, "population: {min_arc_snr: 30}"))
    assert simulate("des", 40, config=config, image_size=32).images.shape == (40, 3, 32, 32)


def test_correlated_noise_is_refused_where_images_bring_their_own(tmp_path: Path) -> None:
    file = tmp_path / "simulation.yaml"
    file.write_text("survey: {noise_correlation: 0.2}\nhosts: lrg.csv\n")
    with pytest.raises(InputError, match=r"survey\.noise_correlation: real images \(hosts\) keep"):
        load_config("des", file)
