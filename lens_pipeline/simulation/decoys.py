"""What looks like a lens and is none.

A decoy has the light, in r, of the lens that it is paired with, the host galaxy's and the arcs', in
another arrangement; but the galaxy alone (`unlensed`, `artefact`) lacks the arcs', and a group's
members have light of their own. What stands beside the host has the arcs' in colours of a source at
that redshift. Young stars of the host itself (`spiral`, `ring`, `edge_on`, the tail of a `merger`)
have those of a star-forming galaxy at its own, and more than the arcs' light. Where they, or a
second nucleus, take of the host's light, what is left in the middle is a smaller galaxy of the same
surface brightness. A `late_type` is another galaxy altogether, where the host would be, among the
host's satellites.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from lens_pipeline.simulation.hosts import HostGalaxies
from lens_pipeline.simulation.multiplicity import COLUMNS, is_multiply_imaged
from lens_pipeline.simulation.neighbours import add_components
from lens_pipeline.simulation.population import (
    RED_SCATTER,
    Array,
    red_sequence,
    source_colours,
)
from lens_pipeline.simulation.streams import Purpose, stream

MAX_MEMBERS = 5
MAX_DISTANCE = 3.0  # of intruders and members from the host, in its Einstein radii
# Of the host's light, which is drawn anew.
REMADE = ("spiral", "merger", "edge_on", "ring", "late_type")
ARC_COLUMNS = (
    *COLUMNS,
    *("x", "y", "source_radius", "source_axis_ratio", "source_angle", "source_galaxy"),
)
BULGE_FLATTENING = 0.6  # of an oblate bulge seen from the side: its short axis over its long one
DEVIATES = 16  # for the decoy as a whole, and for each of its members

Component = tuple[str, pd.DataFrame]  # the profile, as `Renderer.component` takes it, and its rows
Components = list[Component]


def choose_kinds(seed: int, hosts: Iterable[int], mixture: Mapping[str, float]) -> NDArray[np.str_]:
    """The kind of decoy of each host, text (hosts,)."""
    u = np.array([stream(seed, host, Purpose.KIND).random() for host in hosts])
    weights = np.array(list(mixture.values()), dtype=np.float64)
    edges = np.cumsum(weights / weights.sum())[:-1]
    return np.array(list(mixture))[np.searchsorted(edges, u, side="right")]


def draw_decoys(
    galaxies: HostGalaxies, seed: int, lenses: pd.DataFrame, galaxy: Tensor, kinds: NDArray[np.str_]
) -> Tensor:
    """The decoy of each lens in a table: expected electrons (hosts, bands, size, size).

    galaxy: those of the lens galaxies alone. kinds: as `choose_kinds` gives them; those in
    `decoy_kinds.KEEP_HOST` only add to them.
    """
    renderer, hosts = galaxies.renderer, lenses.index.to_numpy()
    u = np.stack(
        [stream(seed, h, Purpose.DECOY).random((1 + MAX_MEMBERS, DEVIATES)) for h in hosts]
    )
    electrons = galaxy.clone()
    components: Components = []
    for kind, build in _BUILDERS.items():
        chosen = np.flatnonzero(kinds == kind)
        if len(chosen):
            if kind in REMADE:
                electrons[chosen] = 0
            components += build(u[chosen], lenses.iloc[chosen])
    position = pd.Series(np.arange(len(hosts)), index=hosts)
    for profile, part in _by_profile(components):
        add_components(electrons, position[part.index].to_numpy(), renderer, profile, part)
    return electrons


def _by_profile(components: Components) -> Components:
    found: dict[str, list[pd.DataFrame]] = {}
    for profile, part in components:
        found.setdefault(profile, []).append(part)
    return [(profile, pd.concat(parts)) for profile, parts in found.items()]


# Each builder takes deviates u (n, 1 + MAX_MEMBERS, DEVIATES) and the lenses' table (n rows), and
# returns the components to add.


def _unlensed(u: Array, lenses: pd.DataFrame) -> Components:
    return []


def _intruders(u: Array, lenses: pd.DataFrame) -> Components:
    count = 1 + (3 * u[:, 0, 0]).astype(int)
    return [_blue_galaxies(u, lenses, count)]


def _singly_imaged(u: Array, lenses: pd.DataFrame) -> Components:
    """The source where it has one image, drawn out a little, and no counter-image.

    1.2 to 2.5 Einstein radii beyond its own half-light radius from the middle, or as much farther
    as the host's ellipticity and shear demand for it to have one image, and for what is twice that
    radius nearer to the middle. It is as large as to have the arcs' light with the
    source's surface brightness; the isothermal sphere magnifies an only image by 1 + theta_E/beta.
    """
    v, theta = u[:, 0], lenses["einstein_radius"].to_numpy()
    beta = theta * (1.2 + 1.3 * v[:, 0])
    unlensed = 1 / (1 + theta / beta)  # share of the arcs' light
    radius = lenses["source_radius"].to_numpy() * np.sqrt(unlensed * lenses["magnification"])
    direction, beta = 2 * np.pi * v[:, 1], beta + radius
    source = lenses.assign(source_radius=radius)
    again = np.full(len(lenses), True)
    while again.any():
        source["source_x"] = beta * np.cos(direction)
        source["source_y"] = beta * np.sin(direction)
        nearest = np.maximum(1 - 2 * radius / beta, 0)  # of its light, in parts of beta
        inner = source.assign(
            source_x=source["source_x"] * nearest, source_y=source["source_y"] * nearest
        )
        again = is_multiply_imaged(source) | is_multiply_imaged(inner)
        beta = np.where(again, 1.2 * beta, beta)
    shown = {name: source[name] for name in ARC_COLUMNS}
    return [_component("arcs", shown | _arc_light(v, lenses, unlensed), lenses)]


def _spiral(u: Array, lenses: pd.DataFrame) -> Components:
    """The host is a bulge; the rest of its light, and that of the arcs, is in the disc.

    Bulges have 0.3 to 0.8 of the light, as in S0 to Sab (Simien & de Vaucouleurs 1986): it is those
    that stand between blue arms as a lens between its arcs. The arms are of young stars, which have
    0.3 to 0.7 of the disc's light; its old ones follow them at a third of the contrast.
    """
    v = u[:, 0]
    bulge, axis_ratio = 0.3 + 0.5 * v[:, 8], np.cos(np.radians(80 * v[:, 1]))
    young = (1 - bulge) * (0.3 + 0.4 * v[:, 9])
    contrast = 0.5 + 0.45 * v[:, 4]
    disc = _inclined(lenses, axis_ratio) | {
        "scale_length": lenses["einstein_radius"] * (0.6 + 1.4 * v[:, 0]),
        "arms": np.where(v[:, 3] < 0.75, 2.0, np.where(v[:, 3] < 0.9, 3.0, 4.0)),
        "pitch": np.radians(10 + 25 * v[:, 5]) * np.where(v[:, 6] < 0.5, 1, -1),
        "phase": 2 * np.pi * v[:, 7],
    }
    old = disc | {"contrast": contrast / 3} | _host_light(lenses, 1 - bulge - young)
    arms = disc | {"contrast": contrast} | _young_light(v, lenses, young)
    return [
        _bulge(lenses, bulge, axis_ratio),
        _component("spiral", old, lenses),
        _component("spiral", arms, lenses),
    ]


def _late_type(u: Array, lenses: pd.DataFrame) -> Components:
    """A small star-forming galaxy, blue around a red middle, or throughout.

    Its bulge has up to 0.4 of the light, as in Sb and later (Simien & de Vaucouleurs 1986), and the
    colours of old stars. It is as far as the host or nearer: as bright at the host's redshift it
    would often be brighter than any disc. Its disc is compact for its light: those are what looks
    like a blurred ring, where a wide one looks like a `spiral`.
    """
    v = u[:, 0]
    z = lenses["z_lens"].to_numpy() * (0.2 + 0.8 * v[:, 0])
    bulge, axis_ratio = 0.4 * v[:, 1], np.cos(np.radians(75 * v[:, 2]))
    old_share = 0.6 * (1 - bulge) * (1 - v[:, 3])
    colours = red_sequence(z)
    old = lenses.assign(lens_g_r=colours[0], lens_r_i=colours[1])
    length = lenses["einstein_radius"].to_numpy() * (0.15 + 0.45 * v[:, 4])
    contrast = 0.2 + 0.7 * v[:, 5]
    disc = _inclined(lenses, axis_ratio) | {
        "scale_length": length,
        "arms": np.where(v[:, 6] < 0.6, 2.0, np.where(v[:, 6] < 0.8, 3.0, 4.0)),
        "pitch": np.radians(15 + 30 * v[:, 7]) * np.where(v[:, 8] < 0.5, 1, -1),
        "phase": 2 * np.pi * v[:, 9],
    }
    middle = old.assign(lens_radius=np.minimum(lenses["lens_radius"], length))
    old_disc = disc | {"contrast": contrast / 3} | _host_light(old, old_share)
    young = _young_light(v, lenses.assign(z_lens=z), 1 - bulge - old_share)
    arms = disc | {"contrast": contrast} | young
    return [
        _bulge(middle, bulge, axis_ratio),
        _component("spiral", old_disc, lenses),
        _component("spiral", arms, lenses),
    ]


def _merger(u: Array, lenses: pd.DataFrame) -> Components:
    v = u[:, 0]
    share = 0.5 + 0.3 * v[:, 0]
    distance = lenses["einstein_radius"] * (0.6 + 1.2 * v[:, 1])
    direction = 2 * np.pi * v[:, 2]
    nucleus = _host_light(lenses, 1 - share) | {
        "x": lenses["x"] + distance * np.cos(direction),
        "y": lenses["y"] + distance * np.sin(direction),
        "lens_radius": lenses["lens_radius"] * np.sqrt(1 - share),
        "axis_ratio": 0.5 + 0.5 * v[:, 3],
        "position_angle": np.pi * v[:, 4],
    }
    drawn_out = _young_light(v, lenses, np.zeros(len(lenses))) | {
        **_at_host(lenses),
        "radius": lenses["einstein_radius"] * (1 + 1.5 * v[:, 5]),
        "width": lenses["einstein_radius"] * (0.12 + 0.15 * v[:, 6]),
        "angle": 2 * np.pi * v[:, 7],
    }
    return [
        _smaller_host(lenses, share),
        _component("elliptical", nucleus, lenses),
        _component("tail", drawn_out, lenses),
    ]


def _edge_on(u: Array, lenses: pd.DataFrame) -> Components:
    """The host is a bulge, with less of the light than in a spiral; of the disc's, which is seen
    through its dust, less is young."""
    v = u[:, 0]
    bulge, axis_ratio = 0.2 + 0.4 * v[:, 2], 0.08 + 0.14 * v[:, 0]
    young = (1 - bulge) * (0.1 + 0.4 * v[:, 3])
    disc = _inclined(lenses, axis_ratio) | {
        "radius": lenses["einstein_radius"] * (0.7 + v[:, 1]) * np.sqrt(axis_ratio),
    }
    return [
        _bulge(lenses, bulge, axis_ratio),
        _component("disc", disc | _host_light(lenses, 1 - bulge - young), lenses),
        _component("disc", disc | _young_light(v, lenses, young), lenses),
    ]


def _group(u: Array, lenses: pd.DataFrame) -> Components:
    """A compact group: the host as it is, two to four fainter galaxies, and a blue one.

    Members are 0.5 to 3 mag fainter than the brightest (within 3 mag of it: Hickson 1982), as often
    as number counts rise, with the red sequence's scatter of colours. Many are faint, and near the
    host, lest a share of the light in the middle be enough to know a group.
    """
    present, row = _members(2 + (3 * u[:, 0, 0]).astype(int))
    v, host = u[:, 1:][present], lenses.iloc[row]
    share = 10 ** (-0.4 * (0.5 + 2.5 * np.sqrt(v[:, 1])))
    distance = host["einstein_radius"] * (0.5 + (MAX_DISTANCE - 0.5) * v[:, 2])
    light = _host_light(host, share)
    members = light | {
        "x": host["x"] + distance * np.cos(2 * np.pi * v[:, 3]),
        "y": host["y"] + distance * np.sin(2 * np.pi * v[:, 3]),
        "lens_radius": host["lens_radius"] * np.sqrt(share),
        "axis_ratio": 0.5 + 0.5 * v[:, 4],
        "position_angle": np.pi * v[:, 5],
        "component_g_r": light["component_g_r"] + RED_SCATTER * ndtri(v[:, 6]),
        "component_r_i": light["component_r_i"] + RED_SCATTER * ndtri(v[:, 7]),
    }
    blue = _blue_galaxies(u, lenses, np.ones(len(lenses), int))
    return [_component("elliptical", members, host), blue]


def _ring(u: Array, lenses: pd.DataFrame) -> Components:
    """A ring galaxy: wider than an Einstein ring of the same galaxy, and with old stars in it."""
    v = u[:, 0]
    bulge, axis_ratio = 0.5 + 0.35 * v[:, 4], 0.25 + 0.65 * v[:, 2]
    young = (1 - bulge) * (0.3 + 0.5 * v[:, 3])
    radius = lenses["einstein_radius"] * (1.2 + 1.3 * v[:, 0])
    loop = _inclined(lenses, axis_ratio) | {
        "radius": radius,
        "width": radius * (0.15 + 0.2 * v[:, 1]),
    }
    return [
        _bulge(lenses, bulge, axis_ratio),
        _component("ring", loop | _host_light(lenses, 1 - bulge - young), lenses),
        _component("ring", loop | _young_light(v, lenses, young), lenses),
    ]


def _star(u: Array, lenses: pd.DataFrame) -> Components:
    """The host as it is, and one or two stars beside it with the light of the arcs."""
    present, row = _members(1 + (2 * u[:, 0, 0]).astype(int))
    weight = np.where(present, 0.3 + 0.7 * u[:, 1:, 0], 0)
    share = (weight / weight.sum(axis=1, keepdims=True))[present]
    v, host = u[:, 1:][present], lenses.iloc[row]
    distance = host["einstein_radius"] * (0.5 + 1.5 * v[:, 1])
    stars = _arc_light(v, host, share) | {
        "x": host["x"] + distance * np.cos(2 * np.pi * v[:, 2]),
        "y": host["y"] + distance * np.sin(2 * np.pi * v[:, 2]),
    }
    return [_component("point", stars, host)]


_BUILDERS: Mapping[str, Callable[[Array, pd.DataFrame], Components]] = {
    "unlensed": _unlensed,
    "intruders": _intruders,
    "singly_imaged": _singly_imaged,
    "spiral": _spiral,
    "late_type": _late_type,
    "merger": _merger,
    "edge_on": _edge_on,
    "group": _group,
    "ring": _ring,
    "star": _star,
    "artefact": _unlensed,  # what damages it is no light of the sky: see `defects`
}


def _members(count: NDArray[np.intp]) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """(present (n, MAX_MEMBERS), the row of each present member)."""
    present = np.arange(MAX_MEMBERS) < count[:, None]
    return present, np.nonzero(present)[0]


def _blue_galaxies(u: Array, lenses: pd.DataFrame, count: NDArray[np.intp]) -> Component:
    """So many galaxies (1 to MAX_MEMBERS) that share the arcs' light, up to MAX_DISTANCE Einstein
    radii away, with the source's shape and surface brightness, which lensing keeps. As many are at
    one distance as at another: where arcs are, more than chance would put there, or how far the
    blue light is from the middle would be enough to know them."""
    present, row = _members(count)
    weight = np.where(present, 0.3 + u[:, 1:, 8], 0)
    share = (weight / weight.sum(axis=1, keepdims=True))[present]
    host, v = lenses.iloc[row], u[:, 1:][present]
    distance = host["einstein_radius"].to_numpy() * MAX_DISTANCE * v[:, 9]
    galaxies = _arc_light(v, host, share) | {
        "x": host["x"] + distance * np.cos(2 * np.pi * v[:, 10]),
        "y": host["y"] + distance * np.sin(2 * np.pi * v[:, 10]),
        "source_radius": host["source_radius"] * np.sqrt(share * host["magnification"]),
        "source_axis_ratio": host["source_axis_ratio"],
        "source_angle": 2 * np.pi * v[:, 12],
        "source_galaxy": host["source_galaxy"],
    }
    return _component("source", galaxies, host)


def _at_host(lenses: pd.DataFrame) -> dict[str, Array]:
    return {"x": lenses["x"].to_numpy(), "y": lenses["y"].to_numpy()}


def _inclined(lenses: pd.DataFrame, axis_ratio: Array) -> dict[str, Array]:
    """A disc about the host, its line of nodes along the host's major axis."""
    return _at_host(lenses) | {
        "axis_ratio": axis_ratio,
        "angle": lenses["position_angle"].to_numpy(),
    }


def _bulge(lenses: pd.DataFrame, share: Array, disc_axis_ratio: Array) -> Component:
    """The host as the oblate bulge in a thin disc of that axis ratio, seen as inclined as it."""
    flattening = BULGE_FLATTENING**2 * (1 - disc_axis_ratio**2)
    return _smaller_host(lenses.assign(axis_ratio=np.sqrt(flattening + disc_axis_ratio**2)), share)


def _smaller_host(lenses: pd.DataFrame, share: Array) -> Component:
    """The host with a share of its light, and the same surface brightness: what is left in the
    middle of a galaxy is no fainter for the light that is elsewhere in it."""
    smaller = _host_light(lenses, share) | {
        **_at_host(lenses),
        "lens_radius": lenses["lens_radius"] * np.sqrt(share),
        "axis_ratio": lenses["axis_ratio"],
        "position_angle": lenses["position_angle"],
    }
    return _component("elliptical", smaller, lenses)


def _host_light(lenses: pd.DataFrame, share: Array) -> dict[str, Array]:
    """A share of the host galaxy's light, in its colours."""
    return {
        "component_magnitude": (lenses["lens_magnitude"] - 2.5 * np.log10(share)).to_numpy(),
        "component_g_r": lenses["lens_g_r"].to_numpy(),
        "component_r_i": lenses["lens_r_i"].to_numpy(),
    }


def _young_light(v: Array, lenses: pd.DataFrame, share: Array) -> dict[str, Array]:
    """A share of the host's r light and all of the arcs', in the colours of a star-forming galaxy
    at the table's `z_lens`."""
    g_r, r_i = source_colours(v[:, 13:15].T, lenses["z_lens"].to_numpy())
    host = share * 10 ** (-0.4 * lenses["lens_magnitude"])
    arcs = lenses["magnification"] * 10 ** (-0.4 * lenses["source_magnitude"])
    return {
        "component_magnitude": -2.5 * np.log10((host + arcs).to_numpy()),
        "component_g_r": g_r,
        "component_r_i": r_i,
    }


def _arc_light(v: Array, lenses: pd.DataFrame, share: Array | float) -> dict[str, Array]:
    """A share of the arcs' light, in the colours of another galaxy at the source's redshift."""
    g_r, r_i = source_colours(v[:, 13:15].T, lenses["z_source"].to_numpy())
    of_source = share * lenses["magnification"]
    return {
        "component_magnitude": (lenses["source_magnitude"] - 2.5 * np.log10(of_source)).to_numpy(),
        "component_g_r": g_r,
        "component_r_i": r_i,
    }


def _component(profile: str, columns: Mapping[str, Any], lenses: pd.DataFrame) -> Component:
    values = {name: np.asarray(value) for name, value in columns.items()}
    return profile, pd.DataFrame(values, index=lenses.index)
