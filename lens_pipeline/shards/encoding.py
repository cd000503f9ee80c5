"""How a cutout's pixels are stored in a shard: as an array of floats, a 16-bit PNG, or a JPEG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from lens_pipeline.catalogue.cutout import FLOAT16_MAX, SIGMA_UNITS
from lens_pipeline.errors import InputError

ENCODINGS = ("float16", "float32", "png16", "jpg")
_FULL_SCALE = 65535
_ASINH_MAX = float(np.arcsinh(FLOAT16_MAX))


@dataclass(frozen=True)
class Encoding:
    """One way to store the cutouts of a dataset.

    name: one of ENCODINGS. `float16` and `float32` are NumPy files. `png16` is a grey 16-bit PNG
    with the bands below each other: of a composite, value x 65535; of background sigma, the code
    32767.5 (1 + asinh(x) / asinh(65504)), whose steps are 0.0004 sigma in the noise and 0.04 % on
    bright pixels. `jpg` is an 8-bit picture, and for composites alone.
    units: of the cutouts, `background_sigma` or `composite`. quality: of a JPEG, 1 to 100.
    Raises InputError where they do not go together.
    """

    name: str
    units: str
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.name not in ENCODINGS:
            raise InputError(f"encoding {self.name!r}: must be one of {', '.join(ENCODINGS)}")
        if (self.name == "jpg") != (self.quality is not None):
            raise InputError("quality: goes with the encoding jpg, and jpg needs it")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InputError(f"quality {self.quality}: must be from 1 to 100")
        if self.name == "jpg" and self.units == SIGMA_UNITS:
            raise InputError(
                "encoding jpg: 8 bits cannot hold linear flux; use float16, float32 or png16"
            )

    @property
    def extension(self) -> str:
        return {"png16": "png", "jpg": "jpg"}.get(self.name, "npy")

    @property
    def is_raw(self) -> bool:
        """Whether the pixels lie in the file as they are in memory."""
        return self.extension == "npy"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers."""
        return np.dtype({"float16": "<f2", "float32": "<f4", "png16": "<u2"}.get(self.name, "u1"))

    def npy_header(self, shape: tuple[int, ...]) -> bytes:
        """What stands before the pixels in a NumPy file of one cutout."""
        header = io.BytesIO()
        described = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(header, described)
        return header.getvalue()

    def stated(self, bands: Sequence[str], shape: Sequence[int]) -> dict[str, Any]:
        """What the `.json` of a sample says of a picture that nobody could read without: its codes
        mean flux, and its rows the bands one after the other."""
        if self.name != "png16":
            return {}
        about = {"encoding": self.name, "units": self.units}
        return {**about, "bands": list(bands), "shape": list(shape)}

    def encode(self, image: NDArray[np.floating]) -> bytes:
        """A picture file of one cutout (bands, height, width)."""
        content = io.BytesIO()
        if self.name == "png16":
            pixels = image.reshape(-1, image.shape[-1]).astype(np.float64)
            if self.units == SIGMA_UNITS:
                pixels = (np.arcsinh(pixels) / _ASINH_MAX + 1) / 2
            code = np.rint(pixels * _FULL_SCALE).clip(0, _FULL_SCALE).astype(np.uint16)
            Image.fromarray(code).save(content, "png")
        else:
            if len(image) not in (1, 3):
                raise InputError(f"encoding jpg: holds 1 or 3 bands, not {len(image)}")
            code = np.rint(image * 255).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(code[0] if len(code) == 1 else np.moveaxis(code, 0, -1))
            picture.save(content, "jpeg", quality=self.quality, subsampling=0)
        return content.getvalue()

    def decode(self, content: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The cutout of a picture file, of this shape (bands, height, width)."""
        with Image.open(io.BytesIO(content)) as picture:
            code = np.asarray(picture)
        if self.name == "jpg":
            pixels = code[None] if code.ndim == 2 else np.moveaxis(code, -1, 0)
            return (pixels / np.float32(255)).astype(np.float32)
        pixels = code.reshape(shape) / _FULL_SCALE
        if self.units == SIGMA_UNITS:
            pixels = np.sinh((2 * pixels - 1) * _ASINH_MAX)
        return pixels.astype(np.float32)
