"""An .npy file that grows cutout by cutout, so that memory does not grow with what is in it."""

from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


class Stack:
    """float32; shape: of one cutout, (bands, height, width)."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.file = path.open("wb")
        self.shape = shape
        self.n = 0
        self._header()

    def _header(self) -> None:
        # NumPy leaves room in the header for a longer first axis, so its length does not change.
        shape = (self.n, *self.shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self.file, header)

    def append(self, pixels: NDArray[np.float32]) -> None:
        self.file.write(np.ascontiguousarray(pixels, dtype="<f4").tobytes())
        self.n += 1

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()
