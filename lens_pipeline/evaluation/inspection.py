"""A page on which people look at candidates and grade them."""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.evaluation.sheets import BLACK, COMPOSITE, SOFTENING, WHITE, upright

# Flux in background sigma is sent as a byte: asinh(flux / SOFTENING) in such steps, from ZERO on.
# That is a sixth of a sigma in the noise, four per cent in cores, and up to 17,000 sigma.
STEP = 1 / 26
ZERO = 20


def _missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _shown(value: Any) -> Any:
    """As JSON has it: dates, lists, what is infinite or no float holds as text."""
    number = isinstance(value, int | float) and math.isfinite(value)
    whole = isinstance(value, int) and abs(value) > 2**53
    return value if number and not whole else str(value)


def inspection_page(
    name: str,
    about: str,
    candidates: pd.DataFrame,
    images: NDArray[np.floating],
    units: str,
    bands: Sequence[str],
) -> str:
    """One self-contained HTML file; a file of grades that it saves is called after `name`.

    about: what is said of all; candidates: `id`, `rank`, `probability`, `sky_probability` of each
    of the images (n, bands, height, width); where there are, `ra` and `dec` (degrees), `known`, the
    lens that it is already; and whatever else is to be seen of one that is enlarged.
    """
    is_drawn = units == COMPOSITE
    codes = 255 * images if is_drawn else np.arcsinh(images / SOFTENING) / STEP + ZERO
    codes = np.moveaxis(upright(np.moveaxis(codes, 1, -1), units), -1, 1)
    pixels = codes.round().clip(0, 255).astype(np.uint8, order="C")
    of_each: list[dict[str, Any]] = [
        {
            **{str(column): _shown(value) for column, value in row.items() if not _missing(value)},
            "pixels": base64.b64encode(zlib.compress(pixels[place].tobytes())).decode(),
        }
        for place, row in enumerate(candidates.to_dict("records"))
    ]
    data = {
        **{"name": name, "about": about, "is_drawn": is_drawn, "bands": list(bands)},
        **{"height": images.shape[2], "width": images.shape[3]},
        **{"step": STEP, "zero": ZERO, "softening": SOFTENING, "white": WHITE, "black": BLACK},
        "candidates": of_each,
    }
    page = files("lens_pipeline.evaluation").joinpath("inspection.html").read_text("utf-8")
    # An id may hold </script>.
    return page.replace("@DATA@", json.dumps(data).replace("<", "\\u003c"))
