"""Fractions of cutouts, with what their number, and their groups, leave open."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

Array = NDArray[np.float64]

FEW = 10  # of fewer that are chosen, or left, how far groups are alike is not seen
LIMIT = 0.95  # of an upper limit, where there is no case


def jeffreys(count: ArrayLike, n: ArrayLike, confidence: float = 0.95) -> tuple[Array, Array]:
    """The ends of a fraction's interval, count of n, under the prior of Jeffreys.

    Brown, Cai & DasGupta 2001 (Stat. Sci. 16, 101), by which it reaches 0 where there is none and 1
    where there is no other; Cameron 2011 (PASA 28, 128) for the use in astronomy.
    """
    count, n = np.asarray(count, dtype=np.float64), np.asarray(n, dtype=np.float64)
    low, high = (
        betaincinv(count + 0.5, n - count + 0.5, (1 + side * confidence) / 2) for side in (-1, 1)
    )
    return np.where(count == 0, 0.0, low), np.where(count == n, 1.0, high)


def fraction(count: int, n: int, effect: float = 1.0) -> dict[str, float | None]:
    """count / n with its 95 % interval (see `jeffreys`), of n / effect independent cutouts (see
    `design_effect`); all None where n is 0."""
    if not n:
        return {"value": None, "low": None, "high": None}
    low, high = jeffreys(count / effect, n / effect)
    return {"value": count / n, "low": float(low), "high": float(high)}


def rate_beyond(count: ArrayLike, n: int, effect: ArrayLike = 1.0) -> tuple[Array, Array, Array]:
    """The rate of non-lenses beyond a threshold that was chosen on n of them for `count` to remain,
    and the ends of its 95 % interval, of n / effect independent ones (see `design_effect`).

    It is no count / n: the threshold lies just above the next non-lens, beyond which the rate is
    that of an order statistic, a Beta(count + 1, n - count) (David & Nagaraja 2003, section 2.1).
    """
    count, effect = np.asarray(count, dtype=np.float64), np.asarray(effect, dtype=np.float64)
    of_beta = (count / effect + 1, (n - count) / effect)
    low, high = (np.where(count == n, 1.0, betaincinv(*of_beta, side)) for side in (0.025, 0.975))
    return (count + 1) / (n + 1), low, high


def design_effect(chosen: ArrayLike, group: ArrayLike | None, usual: float | None = None) -> float:
    """How many times the variance of a fraction that of independent cutouts is; at least 1.

    chosen, group: (n,). Kish 1965: of cutouts of one galaxy or region, which are drawn whole, the
    variance between groups. Where all or none are chosen, which tells nothing, it is the `usual`
    one, or else groups count as one cutout each; where fewer than FEW are, or are left, it is at
    least the usual one.
    """
    found = np.asarray(chosen, dtype=np.float64)
    if group is None or not len(found):
        return 1.0
    _, member = np.unique(np.asarray(group), return_inverse=True)
    n, n_groups, share = len(found), member.max() + 1, found.mean()
    if share in (0, 1) and usual is not None:
        return usual
    if n_groups in (1, n) or share in (0, 1):
        return float(n / n_groups)
    between = (np.bincount(member, found - share) ** 2).sum() * n_groups / (n_groups - 1)
    few = min(share, 1 - share) * n < FEW and usual is not None
    return float(max(usual if few else 1.0, 1.0, between / (n * share * (1 - share))))


def fraction_of(
    chosen: NDArray[np.bool_], group: NDArray[Any] | None, usual: float | None = None
) -> dict[str, float | None]:
    """The fraction that is chosen, (n,), of cutouts in groups: see `design_effect`."""
    return fraction(int(chosen.sum()), len(chosen), design_effect(chosen, group, usual))


def upper_limit(n: ArrayLike) -> Array:
    """The 95 % upper limit of a rate of which n trials show no case (Clopper & Pearson 1934)."""
    return np.asarray(betaincinv(1, n, LIMIT))


def lens_fraction(facts: Mapping[str, Any]) -> float:
    """Of the validation split's cutouts: where lenses are as frequent, `probability` holds. facts:
    `ensemble.json`."""
    counts = facts["validation"]
    return float(counts["n_lens"] / sum(counts.values()))


def real_lens_fraction(facts: Mapping[str, Any]) -> float:
    """The same of its real cutouts, where there were simulated ones beside: a network sees by the
    noise which they are, and has learnt how frequent lenses are among either."""
    counts = facts.get("validation_of_real", facts["validation"])
    return float(counts["n_lens"] / sum(counts.values()))
