"""Pictures of labels and scores: ranking, calibration, purity at a threshold."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.evaluation.forecast import purity, threshold_curve
from lens_pipeline.evaluation.fractions import Array, jeffreys
from lens_pipeline.evaluation.metrics import roc
from lens_pipeline.evaluation.plots import COLOURS, FONT, column_figure, literal, plain

LENS, NONLENS = COLOURS[1], COLOURS[0]
LINEAR_TO = 10  # cutouts: above, the axis of a histogram is logarithmic
DASHES = ("--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))  # nor by colour alone
BINS = 10
FINEST = 6  # decades from 0 and 1 that an axis of probabilities shows

# (false positive rate, true positive rate), read off other data sets; nothing here was tested on
# them. HOLISMOKES XI: fewer than ten of 70,910 non-lenses. Those that give no rate are left out.
PUBLISHED = (
    ("HOLISMOKES XVI", 1e-4, 0.75),  # a committee of five
    ("HOLISMOKES XI", 9 / 70_910, 0.71),  # one network
    ("Holloway 2024", 1e-3, 0.46),  # an ensemble
    ("its best member", 1e-3, 0.34),
)
REFERENCES = {
    "HOLISMOKES XVI: Schuldt et al. 2025, A&A 699, A350": (
        "https://doi.org/10.1051/0004-6361/202554425"
    ),
    "HOLISMOKES XI: Cañameras et al. 2024, A&A 692, A72": (
        "https://shsuyu.github.io/HOLISMOKES/site/paperXI.html"
    ),
    "Holloway et al. 2024, MNRAS 530, 1297": "https://doi.org/10.1093/mnras/stae875",
}


def line_of(number: int, last: int) -> dict[str, Any]:
    """How the curve of that number is drawn: by colour and dashes; the last one stands out."""
    if number == last:
        return {"color": COLOURS[-1], "linewidth": 1.8, "linestyle": "-"}
    colour = COLOURS[number % (len(COLOURS) - 1)]
    return {"color": colour, "linewidth": 1.1, "linestyle": DASHES[number % len(DASHES)]}


def legend_outside(
    figure: Figure,
    handles: list[Any],
    labels: list[str],
    place: Literal["outside lower center", "outside upper center"] = "outside lower center",
    title: str | None = None,
) -> None:
    """Above or below the axes, where it covers no curve."""
    figure.legend(
        handles, labels, loc=place, ncols=2, frameon=False, fontsize=FONT, title=title,
        title_fontsize=FONT, handlelength=2.6, columnspacing=1.2,
    )  # fmt: skip


def roc_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """ROC curves by name, each of (label, score), with the false positive rate in decades.

    Lenses are one in a thousand or rarer, so what matters lies far to the left: where the
    non-lenses cannot resolve the rate, it is hatched. For orientation there are points that were
    published of other data.
    """
    figure = column_figure(3.9)
    axes = plain(figure.add_subplot(), "false positive rate", "true positive rate (completeness)")
    lowest = 1.0
    for number, (name, (label, score)) in enumerate(curves.items()):
        fpr, tpr, _ = roc(label, score)
        least = 1 / np.count_nonzero(np.asarray(label) == 0)
        lowest = min(lowest, least)
        axes.step(
            np.maximum(fpr, least / 2), tpr, where="post", label=literal(name),
            **line_of(number, len(curves) - 1),
        )  # fmt: skip
    left = min(lowest, *(fpr for _, fpr, _ in PUBLISHED)) / 2
    chance = np.geomspace(left, 1, 100)
    axes.plot(chance, chance, color="0.6", linewidth=0.8, linestyle=(0, (1, 3)), label="chance")
    legend_outside(figure, *axes.get_legend_handles_labels())
    points = [
        axes.plot(fpr, tpr, marker, markersize=4.5, markerfacecolor="white", color="0.25")[0]
        for marker, (_, fpr, tpr) in zip("sDvo", PUBLISHED, strict=True)
    ]
    names = [name for name, _, _ in PUBLISHED]
    title = "from other data, for orientation:"
    legend_outside(figure, points, names, "outside upper center", title)
    if left < lowest / 2:
        axes.axvspan(left, lowest / 2, facecolor="none", edgecolor="0.88", hatch="///", zorder=0)
    axes.set(xscale="log", xlim=(left, 1), ylim=(0, 1.01))
    return figure


def precision_recall_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], prevalence: float
) -> Figure:
    """Purity against completeness at the sample's own mixture, by name, each of (label, score).

    Of the last one, the ensemble, also at a prevalence, as far as the sample has false positives to
    tell it.
    """
    figure = column_figure(3.4)
    axes = plain(figure.add_subplot(), "completeness (recall)", "purity (precision)")
    for number, (name, (label, score)) in enumerate(curves.items()):
        curve = threshold_curve(label, score, prevalence)
        line = line_of(number, len(curves) - 1)
        axes.plot(curve["completeness"], curve["purity_of_sample"], label=literal(name), **line)
    axes.plot(
        curve["completeness"], curve["purity"], color=COLOURS[-1], linewidth=1.4, linestyle=":",
        label=f"{literal(name)},\n{one_in(prevalence)}",
    )  # fmt: skip
    axes.set(xlim=(0, 1.01), ylim=(0, 1.03))
    legend_outside(figure, *axes.get_legend_handles_labels())
    return figure


def purity_figure(
    label: ArrayLike, score: ArrayLike, prevalence: float, group: ArrayLike | None = None
) -> Figure:
    """Against the threshold: completeness and purity at the sample's mixture; below, by decades,
    purity at a prevalence.

    The band is the 95 % interval that the false positive rate gives; where there is no false
    positive, purity is above the dots (see `threshold_curve`).
    """
    curve = threshold_curve(label, score, prevalence, group)
    threshold = curve["threshold"].clip(10.0**-FINEST, 1 - 10.0**-FINEST)  # the axis ends there
    figure = column_figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    plain(upper, "", "fraction")
    plain(lower, "threshold of probability", f"purity at {one_in(prevalence)}")
    upper.plot(threshold, curve["completeness"], color=COLOURS[0], label="completeness")
    upper.plot(
        threshold, curve["purity_of_sample"], color=COLOURS[1], linestyle="--",
        label="purity of the sample",
    )  # fmt: skip
    lower.plot(
        threshold, curve["purity"], color=COLOURS[-1], linestyle="-.",
        label=f"purity at\n{one_in(prevalence)}",
    )  # fmt: skip
    lower.fill_between(
        threshold, curve["purity_low"], curve["purity_high"], color="0.8", linewidth=0
    )
    none = curve["false_positives"] == 0
    if none.any():
        lower.plot(
            threshold[none], curve["purity_low"][none], color=COLOURS[-1], linestyle=(0, (1, 1)),
            label="95 % lower limit\nwhere no false\npositive was seen",
        )  # fmt: skip
    ends = (min(threshold.min(), 0.1), max(threshold.max(), 0.9))
    upper.set(xscale="logit", xlim=ends, ylim=(0, 1.02))
    ticks = _probability_ticks(*ends)
    step = max(1, len(ticks) // 3)  # of the decades from 0.5, as many as there is room for
    labelled = {place: label for place, (decade, label) in ticks.items() if decade % step == 0}
    upper.set_xticks(list(labelled), list(labelled.values()))
    upper.set_xticks(list(ticks), minor=True)
    upper.xaxis.set_minor_formatter(NullFormatter())
    lower.set(yscale="log", ylim=(prevalence / 2, 1.2))
    lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if prevalence > 0.05 else (1,)))
    lower.yaxis.set_major_formatter("{x:g}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    drawn = [axes.get_legend_handles_labels() for axes in (upper, lower)]
    legend_outside(figure, *(handles + more for handles, more in zip(*drawn, strict=True)))
    return figure


def _probability_ticks(low: float, high: float) -> dict[float, tuple[int, str]]:
    """{place: (decades from 0.5, label)} on a logit axis between these ends: 0.1, 0.01, ... and
    0.9, 0.99, ...; of an axis that ends there all tenths."""
    if low >= 0.1 and high <= 0.9:
        return {tenth / 10: (0, f"{tenth / 10}") for tenth in range(1, 10)}
    ticks = {0.5: (0, "0.5")}
    for decade in range(1, FINEST + 1):
        least = 10.0**-decade
        ticks[least] = (-decade, f"{least:.{decade}f}")
        ticks[1 - least] = (decade, f"{1 - least:.{decade}f}")
    return {place: tick for place, tick in ticks.items() if low <= place <= high}


def one_in(prevalence: float) -> str:
    """0.001 -> `1 lens in 1,000`; 0.4 -> `40 % lenses`, for whole numbers would say 1 in 2."""
    share = f"{100 * prevalence:.3g} % lenses"
    return share if prevalence > 0.1 else f"1 lens in {round(1 / prevalence):,}"


def reliability_figure(label: ArrayLike, probability: ArrayLike) -> Figure:
    """Predicted probability against the observed fraction of lenses, in bins of equal weight, of
    which those that share a probability have equal parts.

    Lenses and non-lenses weigh the same, and the probabilities are brought there from the mixture
    of the labels: where lenses are few, all points would lie at 0. Bars: the 68 % interval of a
    fraction (see `jeffreys`).
    """
    probabilities = np.asarray(probability, dtype=np.float64)
    labels = np.asarray(label)
    rare = min(1 - 1e-9, max(1e-9, float((labels == 1).mean())))

    def balanced(fraction: ArrayLike) -> Array:
        return purity(fraction, 1 - np.asarray(fraction), 1 - rare)

    shares = pd.Series(labels).groupby(probabilities).transform("mean").to_numpy()
    order = np.argsort(probabilities, kind="stable")
    weight = (shares / rare + (1 - shares) / (1 - rare))[order]
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    bins = np.split(order, np.searchsorted(middle, np.arange(1, BINS) / BINS))
    parts = [part for part in bins if len(part)]
    predicted = balanced([probabilities[part].mean() for part in parts])
    found, n = (np.array([of(part) for part in parts]) for of in (lambda p: shares[p].sum(), len))
    observed = balanced(found / n)
    low, high = map(balanced, jeffreys(found, n, confidence=0.68))
    figure = column_figure()
    axes = plain(figure.add_subplot(), "predicted probability", "observed fraction of lenses")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    errors = [np.maximum(observed - low, 0), np.maximum(high - observed, 0)]
    axes.errorbar(predicted, observed, errors, fmt="o", color=LENS, capsize=2, markersize=4)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    about = f"{len(labels)} cutouts, {len(parts)} equal bins"
    axes.set_title(about, loc="right", fontsize=FONT, color="0.35")  # a bar may be anywhere below
    return figure


def score_histogram_figure(label: ArrayLike, probability: ArrayLike) -> Figure:
    """How lenses and non-lenses are scored."""
    labels, probabilities = np.asarray(label), np.asarray(probability, dtype=np.float64)
    figure = column_figure()
    axes = plain(figure.add_subplot(), "probability", "cutouts")
    edges = np.linspace(0, 1, 26).tolist()
    most = 0
    for value, name, colour, line in (
        (0, "non-lenses", NONLENS, "--"),
        (1, "lenses", LENS, "-"),
    ):
        chosen = probabilities[labels == value]
        counts, _, _ = axes.hist(
            chosen, edges, histtype="stepfilled", alpha=0.3, facecolor=colour, edgecolor=colour,
            linestyle=line, linewidth=1.4, label=f"{name} ({len(chosen)})",
        )  # fmt: skip
        most = max(most, int(np.max(counts)))
    if most > LINEAR_TO:  # the few between the classes show beside the many at the ends
        axes.set_yscale("symlog", linthresh=LINEAR_TO)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(0, 1), ylim=(0, None))
    above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2}
    axes.legend(frameon=False, fontsize=FONT, **above)
    return figure


def known_lenses_figure(rank: ArrayLike, n_cutouts: int) -> Figure:
    """Which fraction of known lenses is among the first candidates, by how many these are.

    rank: among the cutouts, from 1, of each that the model has not learnt from (infinite where it
    has no score). The band is the 95 % interval of a fraction (see `jeffreys`).
    """
    ranks = np.sort(np.asarray(rank, dtype=np.float64))
    looked_at = np.unique(np.concatenate([[1], ranks[np.isfinite(ranks)], [n_cutouts]]))
    found = np.searchsorted(ranks, looked_at, side="right")
    low, high = jeffreys(found, np.full(len(found), len(ranks)))
    figure = column_figure(3.2)
    axes = plain(figure.add_subplot(), "candidates looked at", "fraction of known lenses found")
    axes.fill_between(looked_at, low, high, step="post", color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.step(
        looked_at, found / len(ranks), where="post", color=COLOURS[0],
        label=f"{len(ranks)}, none learnt from",
    )  # fmt: skip
    chance = np.geomspace(1, n_cutouts, 100)
    axes.plot(chance, chance / n_cutouts, color="0.6", linestyle=(0, (1, 3)), label="chance")
    axes.set(xscale="log", xlim=(1, max(n_cutouts, 10)), ylim=(0, 1.02))
    of_all = axes.secondary_xaxis(
        "top", functions=(partial(np.multiply, 1 / n_cutouts), partial(np.multiply, n_cutouts))
    )
    of_all.set_xlabel(f"as a fraction of {n_cutouts:,} cutouts", fontsize=FONT)
    of_all.tick_params(labelsize=FONT)
    legend_outside(figure, *axes.get_legend_handles_labels())
    return figure


def agreement_figure(label: NDArray[np.integer], scores: Mapping[str, ArrayLike]) -> Figure:
    """Spearman's correlation between the scores (n,) of each two members, by name: of lenses above
    the diagonal, of non-lenses below it; label (n,)."""
    table = pd.DataFrame({name: np.asarray(score) for name, score in scores.items()})
    of_lenses, of_others = (
        table[label == value].corr(method="spearman").to_numpy() for value in (1, 0)
    )
    shown = np.triu(of_lenses, 1) + np.tril(of_others, -1)
    np.fill_diagonal(shown, np.nan)
    figure = column_figure(3.4)
    axes = figure.add_subplot()
    axes.imshow(shown, vmin=0, vmax=1, cmap="cividis")
    for row, column in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        value = shown[row, column]
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=FONT,
            color="black" if value > 0.5 else "white",
        )  # fmt: skip
    places, names = range(len(table.columns)), [literal(name) for name in table.columns]
    axes.set_xticks(places, names, rotation=40, ha="right", fontsize=FONT)
    axes.set_yticks(places, names, fontsize=FONT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
