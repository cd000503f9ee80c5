"""Where in the source plane a point has more than one image.

Of a singular isothermal ellipsoid with external shear, as `render.deflect` has them: kappa =
theta_E / 2 sqrt(q x^2 + y^2/q) on the ellipsoid's own axes. Its potential is r F(phi), so that
along each direction phi the deflection is the same at all radii, and the Jacobian is I - Gamma -
(h/r) t t^T, with h = 2 r kappa and t the tangential unit vector (Kormann, Schneider & Bartelmann
1994). The cut is the image of the centre, -alpha(phi); the critical curve, where the Jacobian's
determinant is 0, lies at r = h t^T (I - Gamma)^-1 t. Sources within the cut or within the
tangential caustic, which is the critical curve's image, have more than one image.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.simulation.config import Array

DIRECTIONS = 256  # corners of the polygons that both curves are taken to be
COLUMNS = (
    *("einstein_radius", "axis_ratio", "position_angle"),
    *("shear", "shear_angle", "source_x", "source_y"),
)
ROUND = 1e-4  # 1 - q of an ellipsoid that stands for the sphere, where q = 1 divides by 0


def is_multiply_imaged(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether the source's centre has more than one image, (n,).

    table: COLUMNS, as in `population.candidates`.
    """
    column = {name: table[name].to_numpy(np.float64)[:, None] for name in COLUMNS}
    theta, q = column["einstein_radius"], column["axis_ratio"].clip(max=1 - ROUND)
    phi = np.linspace(0, 2 * np.pi, DIRECTIONS, endpoint=False)
    cos, sin = np.cos(phi), np.sin(phi)  # on the ellipsoid's own axes
    oval, flat = np.hypot(q * cos, sin), np.sqrt(1 - q**2)
    alpha_x = theta * np.sqrt(q) / flat * np.arctan(flat * cos / oval)
    alpha_y = theta * np.sqrt(q) / flat * np.arctanh(flat * sin / oval)

    twice = 2 * (column["shear_angle"] - column["position_angle"])
    gamma_1, gamma_2 = column["shear"] * np.cos(twice), column["shear"] * np.sin(twice)
    determinant = 1 - gamma_1**2 - gamma_2**2
    # t^T (I - Gamma)^-1 t, with t = (-sin, cos)
    stretch = (1 - gamma_1 * np.cos(2 * phi) - gamma_2 * np.sin(2 * phi)) / determinant
    r = theta * np.sqrt(q) / oval * stretch
    caustic_x = r * ((1 - gamma_1) * cos - gamma_2 * sin) - alpha_x
    caustic_y = r * ((1 + gamma_1) * sin - gamma_2 * cos) - alpha_y

    turn = column["position_angle"]
    x = column["source_x"] * np.cos(turn) + column["source_y"] * np.sin(turn)
    y = column["source_y"] * np.cos(turn) - column["source_x"] * np.sin(turn)
    return _encloses(-alpha_x - x, -alpha_y - y) | _encloses(caustic_x - x, caustic_y - y)


def _encloses(x: Array, y: Array) -> NDArray[np.bool_]:
    """Whether the closed polygons of corners x, y (n, corners) go round the origin."""
    after_x, after_y = np.roll(x, -1, axis=1), np.roll(y, -1, axis=1)
    turned = np.arctan2(x * after_y - y * after_x, x * after_x + y * after_y)
    return np.abs(turned.sum(axis=1)) > np.pi
