"""The point spread functions of a survey: Moffat's profiles, or images of the user's own."""

import numpy as np
import torch
from torch import Tensor

from lens_pipeline.errors import InputError
from lens_pipeline.locations import protocol_of
from lens_pipeline.simulation.surveys import Survey

PSF_RADIUS = 24  # pixels: the wings of a bright star end in noise
MAX_OUTSIDE = 0.08  # share of the light that may be beyond
FINER = 8  # than an image of a point spread function, to find its width
MAX_OFF_CENTRE = 0.5  # pixels, of a user's own


def moffat(fwhm: float, beta: float, device: str) -> Tensor:
    """A point spread function of unit sum, (2*PSF_RADIUS+1) pixels a side; fwhm in pixels."""
    square = torch.arange(-PSF_RADIUS, PSF_RADIUS + 1, device=device, dtype=torch.float32) ** 2
    kernel = (1 + (square + square[:, None]) / _scale(fwhm, beta) ** 2) ** -beta
    return kernel / kernel.sum()


def _scale(fwhm: float, beta: float) -> float:
    return fwhm / (2 * (2 ** (1 / beta) - 1) ** 0.5)


def point_spread(survey: Survey, device: str) -> Tensor:
    """The survey's point spread functions (1 or bands, side, side): its own images, or the Moffat
    profiles of its seeing; one where all bands have the same.

    Raises InputError as `read_psf` does, and for profiles so wide that they would be cut.
    """
    if survey.psfs:
        return torch.stack([read_psf(path) for path in survey.psfs]).to(device)
    widths = [fwhm / survey.pixel_scale for fwhm in survey.seeings]
    if len(set(widths)) == 1:
        del widths[1:]
    for width in widths:
        outside = (1 + (PSF_RADIUS / _scale(width, survey.moffat_beta)) ** 2) ** (
            1 - survey.moffat_beta
        )
        if outside > MAX_OUTSIDE:
            raise InputError(
                f"survey.seeing: {outside:.0%} of the light of a Moffat profile of {width:.3g} "
                f"pixels and moffat_beta {survey.moffat_beta:g} is more than {PSF_RADIUS} pixels "
                f"from its middle; {MAX_OUTSIDE:.0%} may be"
            )
    return torch.stack([moffat(width, survey.moffat_beta, device) for width in widths])


def fwhm_of(psf: Tensor) -> float:
    """The diameter, in pixels, of a circle as large as the area in which an image of a point spread
    function is above half its maximum."""
    from scipy.ndimage import zoom

    fine = zoom(psf.numpy(), FINER, order=3, mode="nearest", grid_mode=True)
    return float(2 * np.sqrt((fine > fine.max() / 2).sum() / np.pi) / FINER)


def read_psf(path: str) -> Tensor:
    """The image in a FITS file, of unit sum, cut or padded to 2 PSF_RADIUS + 1 pixels a side.

    Raises InputError, naming the file, where there is none of odd sides and finite pixels, where
    more than MAX_OUTSIDE of its light would be cut off, or where its centroid, weighted by flux
    squared, is more than MAX_OFF_CENTRE from the middle: all that is
    drawn would be moved.
    """
    from astropy.io import fits

    if protocol_of(path):
        raise InputError(f"survey.psf: {path} is a URL; name a file of this machine")
    try:
        found = fits.getdata(path)
        if found is not None and found.dtype.names:
            raise InputError(
                f"survey.psf: {path} holds a table, as PSFEx writes; write its image at the middle"
            )
        image = np.asarray(found, dtype=np.float32)
    except (OSError, TypeError, IndexError) as problem:
        raise InputError(f"survey.psf: {path} cannot be read ({problem})") from None
    if image.ndim != 2 or image.shape[0] != image.shape[1] or image.shape[0] % 2 == 0:
        raise InputError(
            f"survey.psf: {path} has the shape {image.shape}; a square of odd side is needed"
        )
    if not np.isfinite(image).all() or image.sum() <= 0:
        raise InputError(f"survey.psf: {path} has pixels that are not finite, or no light")
    y, x = np.mgrid[: len(image), : len(image)] - (len(image) - 1) / 2
    # By the square of the flux, the peak counts, and neither noise nor wings far away.
    weight = image.astype(np.float64) ** 2
    off_x, off_y = (float((weight * axis).sum() / weight.sum()) for axis in (x, y))
    if np.hypot(off_x, off_y) > MAX_OFF_CENTRE:
        raise InputError(
            f"survey.psf: {path} has its centroid {off_x:+.1f}, {off_y:+.1f} pixels (x, y) from "
            "the middle of the image; centre it"
        )
    side = 2 * PSF_RADIUS + 1
    spare = max(0, (side - len(image)) // 2)
    image = np.pad(image, spare)
    low = (len(image) - side) // 2
    whole, image = image.sum(), image[low : low + side, low : low + side]
    outside = 1 - float(image.sum() / whole)
    if outside > MAX_OUTSIDE:
        raise InputError(
            f"survey.psf: {path} has {outside:.0%} of its light more than {PSF_RADIUS} pixels from "
            f"its middle; {MAX_OUTSIDE:.0%} may be"
        )
    return torch.from_numpy(image / image.sum())
