"""Sheets of cutouts: all alike, the right way up, each under its own words."""

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.evaluation.sheets import contact_sheet, first_cutouts_sheet


def test_a_cutout_of_no_kind_is_shown_by_its_label() -> None:
    table = pd.DataFrame(
        {"label": pd.array([0, 1, 0, None], "Int8"), "kind": ["ring", None, 3.0, "x"]}
    )
    images = np.random.default_rng(0).random((4, 3, 8, 8), np.float32)
    shown = first_cutouts_sheet(images, table, "composite").axes[0].texts
    assert [text.get_text() for text in shown] == ["lens", "ring", "3.0"]
    shown = first_cutouts_sheet(images, table[["label"]], "composite").axes[0].texts
    assert [text.get_text() for text in shown] == ["lens", "non-lens", "non-lens"]


def test_a_contact_sheet_shows_all_cutouts_alike() -> None:
    # The same galaxy, once twice as bright: nothing is normalised image by image.
    faint = np.full((3, 16, 16), 5, dtype=np.float32)
    axes = contact_sheet(np.stack([faint, 2 * faint]), ["a", "b$"], "background_sigma").axes[0]
    shown = axes.images[0].get_array()
    first, second = shown[-16:, :16], shown[-16:, 17:33]
    assert second.mean() > first.mean() * 1.2
    assert np.ptp(first) < 1e-9 > np.ptp(second)
    assert (shown[:, 33:] == 1).all()
    assert [text.get_text() for text in axes.texts] == ["a", "b$"]


def test_no_line_of_a_caption_lies_on_a_cutout() -> None:
    """Its own below, or that of the row above."""
    black = np.zeros((17, 3, 32, 32), dtype=np.float32)
    for caption in ("0.931", "#12  0.931\nSDSSJ095…+100146"):
        figure = contact_sheet(black, [caption] * 17, "composite")
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert len(axes.texts) == 17
        shown = axes.images[0].get_array()
        for text in axes.texts:
            box = text.get_window_extent().transformed(axes.transData.inverted())
            top, bottom = sorted((box.y0, box.y1))
            assert top > -0.5
            left, right = max(0, int(box.x0)), int(np.ceil(box.x1))
            assert (shown[int(np.ceil(top)) : int(bottom) + 1, left:right] == 1).all()


@pytest.mark.parametrize(("units", "row"), [("background_sigma", -1), ("composite", 0)])
def test_a_map_lies_below_its_cutout_the_same_way_up(units: str, row: int) -> None:
    """Of flux the first row is the lowest; of a picture, the uppermost."""
    images = np.zeros((9, 3, 16, 16), dtype=np.float32)
    images[8, :, 0, 3] = 50 if units != "composite" else 1
    maps = images[:, 0] * 7
    shown = contact_sheet(images, ["x"] * 9, units, maps).axes[0].images[0].get_array()
    cutout, below = shown[-32:-16, :16], shown[-16:, :16]
    assert np.unravel_index(cutout.sum(axis=2).argmax(), (16, 16)) == (row % 16, 3)
    assert np.unravel_index(below.sum(axis=2).argmax(), (16, 16)) == (row % 16, 3)
    # A map that is 0 everywhere is drawn as such.
    assert np.ptp(shown[3 + 16 : 3 + 32, :16], axis=(0, 1)).max() == 0
